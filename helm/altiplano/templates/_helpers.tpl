{{/* Names, labels and the pieces that every pod shares. */}}

{{- define "altiplano.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := .Values.fullnameOverride | default (ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name)) -}}
{{- /* 47 characters are KubeRay's limit for a RayService; our longest suffix has 14. Too long is cut with a digest, not silently. */ -}}
{{- if gt (len $full) 33 -}}
{{- printf "%s-%s" ($full | trunc 26 | trimSuffix "-") ($full | sha256sum | trunc 6) -}}
{{- else -}}
{{- $full -}}
{{- end -}}
{{- end -}}

{{- define "altiplano.jobsName" -}}{{ include "altiplano.fullname" . }}-jobs{{- end -}}
{{- define "altiplano.endpointName" -}}{{ include "altiplano.fullname" . }}-endpoint{{- end -}}
{{- define "altiplano.mlflowName" -}}{{ include "altiplano.fullname" . }}-mlflow{{- end -}}
{{- define "altiplano.postgresName" -}}{{ include "altiplano.fullname" . }}-postgres{{- end -}}
{{- define "altiplano.redisName" -}}{{ include "altiplano.fullname" . }}-redis{{- end -}}

{{/* {root, component}: what selects the pods of a component. */}}
{{- define "altiplano.selector" -}}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* {root, component}: labels of an object or of a Ray pod. Never app.kubernetes.io/name on Ray pods: the operator's own selectors use it. */}}
{{- define "altiplano.rayLabels" -}}
{{ include "altiplano.selector" . }}
app.kubernetes.io/part-of: altiplano
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "altiplano.labels" -}}
app.kubernetes.io/name: altiplano
{{ include "altiplano.rayLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{/* {image, tag}: the reference of an image; a digest wins. */}}
{{- define "altiplano.imageOf" -}}
{{- $repository := ternary .image.repository (printf "%s/%s" .image.registry .image.repository) (empty .image.registry) -}}
{{- if .image.digest -}}
{{- printf "%s@%s" $repository .image.digest -}}
{{- else -}}
{{- printf "%s:%s" $repository (.image.tag | default .tag) -}}
{{- end -}}
{{- end -}}

{{- define "altiplano.image" -}}
{{ include "altiplano.imageOf" (dict "image" .Values.image "tag" .Chart.AppVersion) }}
{{- end -}}

{{/* The restricted Pod Security Standard. {user, group, fsGroup} and {}. */}}
{{- define "altiplano.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: {{ .user }}
runAsGroup: {{ .group }}
fsGroup: {{ .fsGroup }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "altiplano.ownPodSecurityContext" -}}
{{- with .Values.podSecurity -}}
{{ include "altiplano.podSecurityContext" (dict "user" .runAsUser "group" .runAsGroup "fsGroup" .fsGroup) }}
{{- end -}}
{{- end -}}

{{- define "altiplano.securityContext" -}}
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
privileged: false
readOnlyRootFilesystem: {{ .Values.podSecurity.readOnlyRootFilesystem }}
runAsNonRoot: true
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* Fields that a user may set on every pod of ours. */}}
{{- define "altiplano.scheduling" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .topologySpreadConstraints }}
topologySpreadConstraints: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- end -}}

{{- define "altiplano.pullSecrets" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* {name, secret, key, optional}: an environment variable from a Secret. */}}
{{- define "altiplano.secretEnv" -}}
- name: {{ .name }}
  valueFrom:
    secretKeyRef:
      name: {{ .secret }}
      key: {{ .key }}
{{- end -}}

{{- define "altiplano.mlflowUri" -}}
{{- if .Values.mlflow.enabled -}}
http://{{ include "altiplano.mlflowName" . }}:5000
{{- else -}}
{{ .Values.mlflow.externalUri }}
{{- end -}}
{{- end -}}

{{- define "altiplano.redisAddress" -}}
{{- if .Values.redis.enabled -}}
{{ include "altiplano.redisName" . }}:6379
{{- else -}}
{{ .Values.redis.externalAddress }}
{{- end -}}
{{- end -}}

{{/* Environment of everything that talks to the object store. */}}
{{- define "altiplano.objectStoreEnv" -}}
{{- with .Values.objectStore }}
{{- if .endpointUrl }}
- name: AWS_ENDPOINT_URL
  value: {{ .endpointUrl | quote }}
- name: MLFLOW_S3_ENDPOINT_URL
  value: {{ .endpointUrl | quote }}
{{- end }}
- name: AWS_DEFAULT_REGION
  value: {{ .region | quote }}
{{- if .existingSecret }}
{{ include "altiplano.secretEnv" (dict "name" "AWS_ACCESS_KEY_ID" "secret" .existingSecret "key" "AWS_ACCESS_KEY_ID") }}
{{ include "altiplano.secretEnv" (dict "name" "AWS_SECRET_ACCESS_KEY" "secret" .existingSecret "key" "AWS_SECRET_ACCESS_KEY") }}
{{- end }}
{{- end }}
{{- end -}}

{{/* {root, name, component, values, class}: a PersistentVolumeClaim of ours; `class` is the storage class where the values name none. */}}
{{- define "altiplano.claim" -}}
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: {{ .name }}
  namespace: {{ .root.Release.Namespace }}
  labels: {{- include "altiplano.labels" (dict "root" .root "component" .component) | nindent 4 }}
  {{- if .root.Values.storage.keep }}
  annotations:
    helm.sh/resource-policy: keep
  {{- end }}
spec:
  accessModes: {{- toYaml .values.accessModes | nindent 4 }}
  {{- with .values.storageClassName | default .class }}
  storageClassName: {{ . | quote }}
  {{- end }}
  resources:
    requests:
      storage: {{ .values.size }}
{{- end -}}

{{/* "true" when a cluster keeps its state in Redis. */}}
{{- define "altiplano.needsRedis" -}}
{{- if or (and .Values.rayCluster.enabled .Values.rayCluster.gcsFaultTolerance) (and .Values.endpoint.enabled .Values.endpoint.gcsFaultTolerance) -}}
true
{{- end -}}
{{- end -}}

{{- define "altiplano.servedModelName" -}}
{{- .Values.endpoint.servedModelName | default (.Values.endpoint.model | base | lower) -}}
{{- end -}}

{{/* {to, ports}: one egress rule of a NetworkPolicy. */}}
{{- define "altiplano.opening" -}}
- to: {{- toYaml .to | nindent 4 }}
  ports:
    {{- range .ports }}
    - {protocol: TCP, port: {{ . }}}
    {{- end }}
{{- end -}}
