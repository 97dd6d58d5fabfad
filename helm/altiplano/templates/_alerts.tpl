{{/* {root, alert}: labels and the runbook of an alert. */}}
{{- define "altiplano.alert" -}}
labels:
  severity: {{ .severity }}
  service: altiplano
annotations:
  summary: {{ .summary | quote }}
  runbook_url: {{ .root.Values.monitoring.rules.runbookUrl }}/{{ .alert | lower }}.md
{{- end -}}

{{/* The groups of alert rules. HAProxy answers 500 where a server is missing, so all of 5xx counts as unavailable; 429 is by design,
as is the 503 of an endpoint that was put to sleep. */}}
{{- define "altiplano.alerts" -}}
{{- $in := printf "namespace=%q" .Release.Namespace -}}
{{- $limits := .Values.monitoring.rules.thresholds -}}
{{- if .Values.endpoint.enabled -}}
- name: altiplano-endpoint
  rules:
    - alert: AltiplanoEndpointAbsent
      expr: absent(altiplano_engine_up{ {{- $in -}} })
      for: 10m
      {{- include "altiplano.alert" (dict "root" . "alert" "AltiplanoEndpointAbsent" "severity" "critical" "summary" "Nobody is scraped: the endpoint has no replica, or its metrics are not reached") | nindent 6 }}
    - alert: AltiplanoEngineDown
      expr: max by (namespace, pod) (altiplano_engine_up{ {{- $in -}} }) == 0
      for: 3m
      {{- include "altiplano.alert" (dict "root" . "alert" "AltiplanoEngineDown" "severity" "critical" "summary" "The engine of {{ $labels.pod }} does not answer") | nindent 6 }}
    - alert: AltiplanoEngineRestarts
      expr: changes(altiplano_engine_restarts{ {{- $in -}} }[30m]) > 2
      {{- include "altiplano.alert" (dict "root" . "alert" "AltiplanoEngineRestarts" "severity" "warning" "summary" "The engine of {{ $labels.pod }} started {{ $value }} times in half an hour") | nindent 6 }}
    - alert: AltiplanoErrors
      expr: |-
        (
            sum by (namespace) (rate(altiplano_requests_total{ {{- $in -}} , status=~"5.."}[5m]))
            - (
              sum by (namespace) (rate(altiplano_requests_asleep_total{ {{- $in -}} }[5m]))
              or 0 * sum by (namespace) (rate(altiplano_requests_total{ {{- $in -}} }[5m]))
            )
        ) / sum by (namespace) (rate(altiplano_requests_total{ {{- $in -}} }[5m])) > {{ $limits.errorRatio }}
      for: 5m
      {{- include "altiplano.alert" (dict "root" . "alert" "AltiplanoErrors" "severity" "critical" "summary" "{{ $value | humanizePercentage }} of answers are errors") | nindent 6 }}
    - alert: AltiplanoSlowFirstToken
      expr: |-
        histogram_quantile(0.95, sum by (namespace, le) (rate(altiplano_time_to_first_token_seconds_bucket{ {{- $in -}} }[5m]))) > {{ $limits.ttftP95Seconds }}
      for: 10m
      {{- include "altiplano.alert" (dict "root" . "alert" "AltiplanoSlowFirstToken" "severity" "warning" "summary" "One request in twenty waits more than {{ $value | humanizeDuration }} for its first token") | nindent 6 }}
    - alert: AltiplanoQueue
      expr: sum by (namespace) (altiplano_num_requests_waiting{ {{- $in -}} }) > {{ $limits.waitingRequests }}
      for: 10m
      {{- include "altiplano.alert" (dict "root" . "alert" "AltiplanoQueue" "severity" "warning" "summary" "{{ $value }} requests wait for the engine") | nindent 6 }}
    - alert: AltiplanoKvCacheFull
      expr: max by (namespace, pod) (altiplano_kv_cache_usage_perc{ {{- $in -}} }) > {{ $limits.kvCacheUsage }}
      for: 10m
      {{- include "altiplano.alert" (dict "root" . "alert" "AltiplanoKvCacheFull" "severity" "warning" "summary" "{{ $labels.pod }} holds {{ $value | humanizePercentage }} of its KV pages for requests") | nindent 6 }}
    - alert: AltiplanoCost
      expr: sum by (namespace) (rate(altiplano_cost_usd_total{ {{- $in -}} }[1h])) * 3600 > {{ $limits.costUsdPerHour }}
      for: 15m
      {{- include "altiplano.alert" (dict "root" . "alert" "AltiplanoCost" "severity" "warning" "summary" "Answers cost {{ $value | humanize }} USD an hour") | nindent 6 }}
{{ end -}}
- name: altiplano-cluster
  rules:
    - alert: AltiplanoNodeMemory
      expr: ray_node_mem_used{ {{- $in -}} } / ray_node_mem_total{ {{- $in -}} } > 0.95
      for: 5m
      {{- include "altiplano.alert" (dict "root" . "alert" "AltiplanoNodeMemory" "severity" "warning" "summary" "{{ $labels.pod }} uses {{ $value | humanizePercentage }} of its memory") | nindent 6 }}
    - alert: AltiplanoMemoryKills
      expr: sum by (namespace) (increase(ray_memory_manager_worker_eviction_total{ {{- $in -}} }[15m])) > 0
      {{- include "altiplano.alert" (dict "root" . "alert" "AltiplanoMemoryKills" "severity" "warning" "summary" "Ray ended workers because a node ran out of memory") | nindent 6 }}
    - alert: AltiplanoNodeDisk
      expr: ray_node_disk_free{ {{- $in -}} } / (ray_node_disk_free{ {{- $in -}} } + ray_node_disk_usage{ {{- $in -}} }) < 0.1
      for: 10m
      {{- include "altiplano.alert" (dict "root" . "alert" "AltiplanoNodeDisk" "severity" "warning" "summary" "{{ $labels.pod }} has {{ $value | humanizePercentage }} of its disk left") | nindent 6 }}
    {{- if .Values.rayCluster.enabled }}
    - alert: AltiplanoTasksWaitForNodes
      expr: sum by (namespace) (ray_tasks{ {{- $in -}} , State="PENDING_NODE_ASSIGNMENT"}) > 0
      for: 30m
      {{- include "altiplano.alert" (dict "root" . "alert" "AltiplanoTasksWaitForNodes" "severity" "warning" "summary" "{{ $value }} tasks have waited half an hour for a node") | nindent 6 }}
    - alert: AltiplanoGpusIdle
      expr: avg by (namespace) (ray_node_gpus_utilization{ {{- $in -}} , component="jobs"}) < 5
      for: 1h
      {{- include "altiplano.alert" (dict "root" . "alert" "AltiplanoGpusIdle" "severity" "info" "summary" "The GPUs of the jobs cluster have been idle for an hour") | nindent 6 }}
    {{- end }}
{{- if .Values.backup.enabled }}
- name: altiplano-backup
  rules:
    - alert: AltiplanoBackupMissing
      # From kube-state-metrics. A schedule that is less frequent than twelve-hourly needs a rule of its own.
      expr: time() - max by (namespace, cronjob) (kube_cronjob_status_last_successful_time{ {{- $in -}} , cronjob="{{ include "altiplano.fullname" . }}-backup"}) > 86400
      {{- include "altiplano.alert" (dict "root" . "alert" "AltiplanoBackupMissing" "severity" "critical" "summary" "No backup of the database for {{ $value | humanizeDuration }}") | nindent 6 }}
{{- end }}
{{- end -}}
