{{/* The endpoint: its Serve application and the cluster under it. */}}

{{/*
What `serveConfigV2` holds: for the same settings what altiplano.serve.application:serve_config makes, and a test holds both equal. Here are also what the
place decides: resources of a replica and how many a pod holds. Adapters and aliases are user_config, which replicas take without a restart.
*/}}
{{- define "altiplano.serveConfig" -}}
{{- $values := .Values.endpoint -}}
{{- $answers := add ($values.engine.max_num_seqs | default 64) (dig "max_queued_seqs" 256 $values.limits) -}}
{{- $light := 32 -}}
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
      api_keys_file: /etc/altiplano/keys/api-keys.json
      {{- with $values.limits }}
      limits: {{- toYaml . | nindent 8 }}
      {{- end }}
      response_cache_bytes: {{ int64 $values.responseCacheBytes }}
      metrics_port: {{ $values.metricsPort }}
      health_check_timeout_s: {{ $values.healthCheckTimeoutSeconds }}
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
        {{- include "altiplano.replicas" $values | nindent 8 }}
        {{- if and (eq $values.routing "session") (not $values.haProxy) }}
        request_router_config:
          request_router_class: ray.serve.experimental.consistent_hash_router:ConsistentHashRouter
        {{- end }}
        # The endpoint's own queue refuses first; these bounds stand behind it. A burst on an idle replica counts as queued for a moment.
        max_ongoing_requests: {{ ternary (add $answers $light) $values.maxOngoingRequests (kindIs "invalid" $values.maxOngoingRequests) }}
        max_queued_requests: {{ ternary (add $answers $light) $values.maxQueuedRequests (kindIs "invalid" $values.maxQueuedRequests) }}
        backpressure_config: {status_code: 429, retry_after_s: 1}
        # A lost pod takes one replica with it, not all.
        max_replicas_per_node: 1
        graceful_shutdown_timeout_s: {{ $values.gracefulShutdownTimeoutSeconds }}
        health_check_period_s: 5
        # The replica's own look at its engine ends before Serve gives up waiting for it.
        health_check_timeout_s: {{ addf $values.healthCheckTimeoutSeconds 10 }}
        ray_actor_options:
          num_cpus: {{ $values.cpusPerReplica }}
          num_gpus: {{ $values.gpusPerReplica }}
        user_config:
          adapters: {{- toYaml $values.adapters | nindent 12 }}
          aliases: {{- toYaml $values.aliases | nindent 12 }}
{{- end -}}

{{/* How many replicas run: a number, or our policy of three rules. */}}
{{- define "altiplano.replicas" -}}
{{- if eq (int .replicas.min) (int .replicas.max) -}}
num_replicas: {{ .replicas.min }}
{{- else -}}
{{- $target := ternary (mulf 0.8 (.engine.max_num_seqs | default 64)) .targetOngoingRequests (kindIs "invalid" .targetOngoingRequests) -}}
autoscaling_config:
  min_replicas: {{ .replicas.min }}
  max_replicas: {{ .replicas.max }}
  look_back_period_s: 20
  upscale_delay_s: {{ .upscaleDelaySeconds }}
  downscale_delay_s: {{ .downscaleDelaySeconds }}
  downscale_to_zero_delay_s: {{ .downscaleToZeroDelaySeconds }}
  # Serve's own rule, which is not used, also decides what a request to no replica is worth.
  target_ongoing_requests: {{ $target }}
  policy:
    policy_function: altiplano.serve.autoscaling:ReplicaPolicy
    policy_kwargs:
      num_seqs: {{ $target }}
      kv_cache_usage: {{ .targetKvCacheUsage }}
      ttft_s: {{ ternary "null" .targetTtftSeconds (kindIs "invalid" .targetTtftSeconds) }}
{{- end -}}
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
{{- $delay := $values.rayClusterDeletionDelaySeconds }}
rayClusterDeletionDelaySeconds: {{ ternary $values.gracefulShutdownTimeoutSeconds $delay (kindIs "invalid" $delay) }}
# The head runs no replica; a request that it takes would only be sent on.
excludeHeadPodFromServeSvc: true
serveConfigV2: |
  {{- include "altiplano.serveConfig" .root | nindent 2 }}
rayClusterConfig: {{- toYaml .clusterSpec | nindent 2 }}
{{- end -}}
