{{/* The pods and clusters of Ray. */}}

{{/* {root, cluster: jobs|endpoint}: environment of every Ray container. */}}
{{- define "altiplano.ray.env" -}}
{{- $root := .root -}}
{{- $values := ternary $root.Values.rayCluster $root.Values.endpoint (eq .cluster "jobs") -}}
{{- if ne $values.auth.mode "token" }}
# The image asks for tokens by default; the operator sets both variables itself when the mode is token.
- name: RAY_AUTH_MODE
  value: disabled
{{- end }}
- name: HF_HOME
  value: /models/huggingface
{{- if $root.Values.hubOffline }}
- name: HF_HUB_OFFLINE
  value: "1"
{{- end }}
{{- with $root.Values.secrets.hfToken }}
{{- if .name }}
{{ include "altiplano.secretEnv" (dict "name" "HF_TOKEN" "secret" .name "key" .key) }}
{{- end }}
{{- end }}
# The root filesystem is read-only: compilers write their caches here.
- name: XDG_CACHE_HOME
  value: /tmp/cache
- name: TRITON_CACHE_DIR
  value: /tmp/cache/triton
- name: CUDA_CACHE_PATH
  value: /tmp/cache/cuda
{{- if include "altiplano.mlflowUri" $root }}
- name: MLFLOW_TRACKING_URI
  value: {{ include "altiplano.mlflowUri" $root }}
{{- if $root.Values.mlflow.enabled }}
- name: MLFLOW_TRACKING_USERNAME
  value: admin
{{ include "altiplano.secretEnv" (dict "name" "MLFLOW_TRACKING_PASSWORD" "secret" $root.Values.secrets.name "key" "mlflow-admin-password") }}
{{- end }}
# Models that carry code or pickles are not loaded. The second name is that of MLflow before 3.18.
- name: MLFLOW_ALLOW_MODEL_CODE_EXECUTION
  value: "false"
- name: MLFLOW_ALLOW_PICKLE_DESERIALIZATION
  value: "false"
{{- end }}
{{- with $root.Values.monitoring.prometheusUrl }}
- name: RAY_PROMETHEUS_HOST
  value: {{ . | quote }}
{{- end }}
{{- with $root.Values.monitoring.grafanaUrl }}
- name: RAY_GRAFANA_HOST
  value: {{ . | quote }}
{{- end }}
{{- include "altiplano.objectStoreEnv" $root }}
{{- if eq .cluster "endpoint" }}
{{- include "altiplano.proxyEnv" $root.Values.endpoint }}
{{- end }}
{{- end -}}

{{/*
The proxy of Serve: what altiplano.serve.proxy:proxy_environment says, and a test holds both equal. Serve's processes read it when they start, so it belongs to
the pods: a change makes a new cluster. Ports of HAProxy's statistics stay Ray's: a pod has its own.
*/}}
{{- define "altiplano.proxyEnv" }}
- name: RAY_SERVE_ENABLE_HA_PROXY
  value: {{ ternary "1" "0" .haProxy | quote }}
{{- if .haProxy }}
- name: RAY_SERVE_THROUGHPUT_OPTIMIZED
  value: "1"
# HAProxy learns at once that a replica leaves; Ray's 30 s are for load balancers that only look now and then.
- name: RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S
  value: "5"
# Every change of replicas starts a new HAProxy; the old one ends its streams for this long.
- name: RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S
  value: {{ .gracefulShutdownTimeoutSeconds | quote }}
- name: RAY_SERVE_HAPROXY_BALANCE_ALGORITHM
  value: {{ ternary "hdr(x-session-id)\n    hash-type consistent\n    hash-balance-factor 150" "leastconn" (eq .routing "session") | quote }}
# What a dying replica has not begun to answer goes to another one.
- name: RAY_SERVE_HAPROXY_RETRY_ON
  value: {{ printf "conn-failure empty-response\n    option http-buffer-request\n    timeout http-request %.0fms" (mulf 1000 (.limits.body_timeout_s | default 30) | ceil) | quote }}
{{- end }}
{{- end -}}

{{/* {root, cluster}: volumes of every Ray pod, and where they are mounted. */}}
{{- define "altiplano.ray.volumes" -}}
- name: tmp
  emptyDir: {}
{{- with .root.Values.storage }}
- name: models
  {{- if .modelCache.enabled }}
  persistentVolumeClaim:
    claimName: {{ .modelCache.existingClaim | default (printf "%s-models" (include "altiplano.fullname" $.root)) }}
  {{- else }}
  emptyDir: {}
  {{- end }}
- name: workspace
  {{- if .workspace.enabled }}
  persistentVolumeClaim:
    claimName: {{ .workspace.existingClaim | default (printf "%s-workspace" (include "altiplano.fullname" $.root)) }}
  {{- else }}
  emptyDir: {}
  {{- end }}
{{- end }}
{{- if eq .cluster "endpoint" }}
- name: api-keys
  secret:
    secretName: {{ .root.Values.secrets.name }}
    defaultMode: 0440
    items:
      - {key: api-keys.json, path: api-keys.json}
{{- end }}
{{- end -}}

{{- define "altiplano.ray.mounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: models, mountPath: /models}
- {name: workspace, mountPath: /workspace}
{{- if eq .cluster "endpoint" }}
- {name: api-keys, mountPath: /etc/altiplano/keys, readOnly: true}
{{- end }}
{{- end -}}

{{/* The arguments of ray.pod, and gracePeriod in seconds. */}}
{{- define "altiplano.ray.podSpec" -}}
{{- $root := .root -}}
serviceAccountName: {{ include "altiplano.fullname" $root }}-{{ .cluster }}-{{ .role }}
# The autoscaler beside the head patches the RayCluster and its pods; nothing else talks to Kubernetes.
automountServiceAccountToken: {{ and (eq .role "head") .autoscaling }}
enableServiceLinks: false
# Autoscaler v2 replaces pods, it does not restart containers.
restartPolicy: {{ ternary "Never" "Always" .autoscaling }}
terminationGracePeriodSeconds: {{ .gracePeriod }}
securityContext: {{- include "altiplano.ownPodSecurityContext" $root | nindent 2 }}
{{- include "altiplano.pullSecrets" $root }}
{{- include "altiplano.scheduling" .group }}
volumes:
  {{- include "altiplano.ray.volumes" . | nindent 2 }}
  {{- with .group.volumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
containers:
  # KubeRay takes the first container for Ray's, and adds its command and probes.
  - name: ray-{{ .role }}
    image: {{ include "altiplano.image" $root }}
    imagePullPolicy: {{ $root.Values.image.pullPolicy }}
    securityContext: {{- include "altiplano.securityContext" $root | nindent 6 }}
    env:
      {{- include "altiplano.ray.env" . | trim | nindent 6 }}
      {{- with .group.env }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    ports:
      - {name: metrics, containerPort: 8080}
      {{- if eq .role "head" }}
      - {name: gcs-server, containerPort: 6379}
      - {name: dashboard, containerPort: 8265}
      - {name: client, containerPort: 10001}
      - {name: as-metrics, containerPort: 44217}
      - {name: dash-metrics, containerPort: 44227}
      {{- end }}
      {{- if eq .cluster "endpoint" }}
      - {name: serve, containerPort: 8000}
      {{- if eq .role "worker" }}
      # One replica a pod, so its metrics are at the first port.
      - {name: replica-metrics, containerPort: {{ $root.Values.endpoint.metricsPort }}}
      {{- end }}
      {{- end }}
    resources: {{- toYaml .group.resources | nindent 6 }}
    volumeMounts:
      {{- include "altiplano.ray.mounts" . | nindent 6 }}
      {{- with .group.volumeMounts }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    {{- if eq .role "worker" }}
    lifecycle:
      preStop:
        exec:
          # Ends before the kubelet loses patience: Ray's own processes need the rest.
          command: ["/bin/bash", "-c", {{ $root.Files.Get "files/drain_node.sh" | quote }}, drain, {{ sub .gracePeriod 30 | quote }}]
    {{- end }}
{{- end -}}

{{/* {root, cluster, role: head|worker, group: values, autoscaling: bool}: the template of a Ray pod. */}}
{{- define "altiplano.ray.pod" -}}
{{- $root := .root -}}
metadata:
  labels: {{- include "altiplano.rayLabels" (dict "root" $root "component" .cluster) | nindent 4 }}
  {{- with .group.podAnnotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
{{- /* A replica's answers, and two minutes for the replica that takes over. */ -}}
{{- $grace := ternary (add $root.Values.endpoint.gracefulShutdownTimeoutSeconds 120) 120 (eq .cluster "endpoint") -}}
{{- $spec := fromYaml (include "altiplano.ray.podSpec" (merge (dict "gracePeriod" $grace) .)) -}}
{{- toYaml (mergeOverwrite $spec (.group.podSpec | default dict)) | nindent 2 }}
{{- end -}}

{{/* {root, values}: autoscaler beside the head. */}}
{{- define "altiplano.ray.autoscaler" -}}
version: v2
idleTimeoutSeconds: {{ .autoscaling.idleTimeoutSeconds }}
upscalingMode: {{ .autoscaling.upscalingMode | default "Default" }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
resources: {{- toYaml .autoscaling.resources | nindent 2 }}
securityContext: {{- include "altiplano.securityContext" .root | nindent 2 }}
volumeMounts:
  - {name: tmp, mountPath: /tmp}
{{- end -}}

{{- define "altiplano.ray.auth" -}}
mode: {{ .mode }}
{{- with .existingSecret }}
secretName: {{ . }}
{{- end }}
{{- end -}}

{{- define "altiplano.ray.gcs" -}}
redisAddress: {{ include "altiplano.redisAddress" . | quote }}
redisPassword:
  valueFrom:
    secretKeyRef:
      name: {{ .Values.secrets.name }}
      key: redis-password
{{- end -}}

{{/* {root, cluster, autoscaling, group}: the head of a cluster. It runs no tasks. */}}
{{- define "altiplano.ray.head" -}}
{{- $params := merge (dict) (.group.rayStartParams | default dict) (dict "dashboard-host" "0.0.0.0" "metrics-export-port" "8080" "num-cpus" "0") -}}
serviceType: ClusterIP
rayStartParams: {{- toYaml $params | nindent 2 }}
template: {{- include "altiplano.ray.pod" (merge (dict "role" "head") .) | nindent 2 }}
{{- end -}}

{{/* {root, cluster, autoscaling, name, group}: a worker group. */}}
{{- define "altiplano.ray.workers" -}}
{{- $custom := merge (dict .name 1) (.group.customResources | default dict) -}}
{{- $params := merge (dict) (.group.rayStartParams | default dict) (dict "metrics-export-port" "8080" "resources" ($custom | toJson | quote)) -}}
groupName: {{ .name }}
minReplicas: {{ .group.minReplicas }}
maxReplicas: {{ .group.maxReplicas }}
replicas: {{ .replicas }}
numOfHosts: {{ .group.numOfHosts | default 1 }}
{{- if hasKey .group "idleTimeoutSeconds" }}
idleTimeoutSeconds: {{ .group.idleTimeoutSeconds }}
{{- end }}
rayStartParams: {{- toYaml $params | nindent 2 }}
template: {{- include "altiplano.ray.pod" (merge (dict "role" "worker") .) | nindent 2 }}
{{- end -}}

{{/* {root, cluster, autoscaling}: the spec of the jobs cluster. */}}
{{- define "altiplano.rayClusterSpec" -}}
{{- $values := .root.Values.rayCluster -}}
rayVersion: {{ .root.Values.rayVersion | quote }}
enableInTreeAutoscaling: {{ .autoscaling }}
{{- if .autoscaling }}
autoscalerOptions: {{- include "altiplano.ray.autoscaler" (dict "root" .root "autoscaling" $values.autoscaling) | nindent 2 }}
{{- end }}
authOptions: {{- include "altiplano.ray.auth" $values.auth | nindent 2 }}
{{- with $values.upgradeStrategy }}
upgradeStrategy:
  type: {{ . }}
{{- end }}
{{- if $values.gcsFaultTolerance }}
gcsFaultToleranceOptions: {{- include "altiplano.ray.gcs" .root | nindent 2 }}
{{- end }}
headGroupSpec:
  {{- $head := fromYaml (include "altiplano.ray.head" (merge (dict "group" $values.head) .)) }}
  {{- toYaml (mergeOverwrite $head ($values.head.extraSpec | default dict)) | nindent 2 }}
workerGroupSpecs:
  {{- $context := . }}
  {{- range $name, $group := $values.workerGroups }}
  {{- if and $group (ne (toString (dig "enabled" true ($group | default dict))) "false") }}
  {{- $replicas := ternary $group.minReplicas $group.replicas (kindIs "invalid" $group.replicas) }}
  {{- $spec := fromYaml (include "altiplano.ray.workers" (merge (dict "name" $name "group" $group "replicas" $replicas) $context)) }}
  - {{ toYaml (mergeOverwrite $spec ($group.extraSpec | default dict)) | nindent 4 | trim }}
  {{- end }}
  {{- end }}
{{- end -}}

{{/* The RayCluster for jobs. */}}
{{- define "altiplano.rayCluster" -}}
{{- $values := .Values.rayCluster -}}
{{- $common := dict "root" . "cluster" "jobs" "autoscaling" $values.autoscaling.enabled -}}
apiVersion: ray.io/v1
kind: RayCluster
metadata:
  name: {{ include "altiplano.jobsName" . }}
  namespace: {{ .Release.Namespace }}
  labels:
    {{- include "altiplano.labels" (dict "root" . "component" "jobs") | nindent 4 }}
    {{- with .Values.kueue.queueName }}
    kueue.x-k8s.io/queue-name: {{ . }}
    {{- end }}
    {{- with .Values.kueue.priorityClassName }}
    kueue.x-k8s.io/priority-class: {{ . }}
    {{- end }}
spec:
{{- $spec := fromYaml (include "altiplano.rayClusterSpec" $common) -}}
{{- toYaml (mergeOverwrite $spec $values.extraSpec) | nindent 2 }}
{{- end -}}
