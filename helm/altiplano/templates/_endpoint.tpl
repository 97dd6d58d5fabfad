{{/* The endpoint: its Serve application and the cluster under it. */}}

{{/* What `serveConfigV2` holds. Adapters and aliases are user_config, which replicas take without a restart. */}}
{{- define "altiplano.serveConfig" -}}
{{- $values := .Values.endpoint -}}
# A replica on every node that has a proxy: KubeRay's probe asks the proxy of each worker.
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: 8000
applications:
  - name: altiplano
    route_prefix: /
    import_path: {{ $values.importPath }}
    args:
      model: {{ $values.model | quote }}
      served_model_name: {{ include "altiplano.servedModelName" . | quote }}
      {{- if $values.apiKeys }}
      api_keys_file: /etc/altiplano/keys/api-keys.json
      {{- end }}
      {{- if not (kindIs "invalid" $values.usdPerHour) }}
      usd_per_hour: {{ $values.usdPerHour }}
      {{- end }}
      {{- with $values.otlpEndpoint }}
      otlp_endpoint: {{ . }}
      {{- end }}
      {{- with $values.engine }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    deployments:
      - name: endpoint
        {{- if eq (int $values.replicas.min) (int $values.replicas.max) }}
        num_replicas: {{ $values.replicas.min }}
        {{- else }}
        autoscaling_config:
          min_replicas: {{ $values.replicas.min }}
          max_replicas: {{ $values.replicas.max }}
          target_ongoing_requests: {{ $values.targetOngoingRequests }}
        {{- end }}
        max_ongoing_requests: {{ $values.maxOngoingRequests }}
        max_queued_requests: {{ $values.maxQueuedRequests }}
        # A lost pod takes one replica with it, not all.
        max_replicas_per_node: 1
        graceful_shutdown_timeout_s: {{ $values.gracefulShutdownTimeoutSeconds }}
        health_check_timeout_s: 40
        ray_actor_options:
          num_cpus: {{ $values.cpusPerReplica }}
          num_gpus: {{ $values.gpusPerReplica }}
        user_config:
          adapters: {{- toYaml $values.adapters | nindent 12 }}
          aliases: {{- toYaml $values.aliases | nindent 12 }}
{{- end -}}

{{/* {root, cluster, autoscaling}: the RayCluster under the endpoint; one worker pod holds one replica. */}}
{{- define "altiplano.endpointClusterSpec" -}}
{{- $values := .root.Values.endpoint -}}
rayVersion: {{ .root.Values.rayVersion | quote }}
enableInTreeAutoscaling: {{ .autoscaling }}
{{- if .autoscaling }}
autoscalerOptions: {{- include "altiplano.ray.autoscaler" (dict "root" .root "autoscaling" $values.autoscaling) | nindent 2 }}
{{- end }}
authOptions: {{- include "altiplano.ray.auth" $values.auth | nindent 2 }}
{{- if $values.gcsFaultTolerance }}
gcsFaultToleranceOptions: {{- include "altiplano.ray.gcs" .root | nindent 2 }}
{{- end }}
headGroupSpec:
  {{- $head := fromYaml (include "altiplano.ray.head" (merge (dict "group" $values.head) .)) }}
  {{- toYaml (mergeOverwrite $head ($values.head.extraSpec | default dict)) | nindent 2 }}
workerGroupSpecs:
  {{- $group := merge (dict "minReplicas" $values.replicas.min "maxReplicas" $values.replicas.max) $values.worker }}
  {{- $workers := fromYaml (include "altiplano.ray.workers" (merge (dict "name" "endpoint" "group" $group "replicas" $values.replicas.min) .)) }}
  - {{ toYaml (mergeOverwrite $workers ($values.worker.extraSpec | default dict)) | nindent 4 | trim }}
{{- end -}}

{{/* The same, and clusterSpec. */}}
{{- define "altiplano.rayServiceSpec" -}}
{{- $values := .root.Values.endpoint -}}
upgradeStrategy:
  type: {{ $values.upgradeStrategy }}
  {{- if eq $values.upgradeStrategy "NewClusterWithIncrementalUpgrade" }}
  clusterUpgradeOptions: {{- toYaml $values.incrementalUpgrade | nindent 4 }}
  {{- end }}
rayClusterDeletionDelaySeconds: {{ $values.rayClusterDeletionDelaySeconds }}
# The head runs no replica; a request that it takes would only be sent on.
excludeHeadPodFromServeSvc: true
serveConfigV2: |
  {{- include "altiplano.serveConfig" .root | nindent 2 }}
rayClusterConfig: {{- toYaml .clusterSpec | nindent 2 }}
{{- end -}}
