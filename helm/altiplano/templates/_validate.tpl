{{/*
What a schema cannot say: rules between values, and the rules that only KubeRay's operator enforces. Everything that is wrong is told at once.
*/}}
{{- define "altiplano.validate" -}}
{{- $wrong := list -}}
{{- $v := .Values -}}
{{- $kuberay := $v.kuberayVersion -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" (include "altiplano.fullname" .)) -}}
{{- $wrong = append $wrong (printf "fullnameOverride: %q is no name for Ray objects: begin with a letter, then letters, digits and '-'" (include "altiplano.fullname" .)) -}}
{{- end -}}
{{- range $label, $_ := $v.commonLabels -}}
{{- if regexMatch "^(app\\.kubernetes\\.io|helm\\.sh|ray\\.io)/" $label -}}
{{- $wrong = append $wrong (printf "commonLabels.%s: selectors of this chart and of KubeRay use it: take another prefix" $label) -}}
{{- end -}}
{{- end -}}
{{- if semverCompare "<1.5.1-0" $kuberay -}}
{{- $wrong = append $wrong (printf "kuberayVersion: %s lacks fields that this chart always sets: upgrade KubeRay to 1.5.1 or newer" $kuberay) -}}
{{- end -}}
{{- if not (or $v.rayCluster.enabled $v.endpoint.enabled $v.mlflow.enabled) -}}
{{- $wrong = append $wrong "rayCluster.enabled, endpoint.enabled, mlflow.enabled: nothing is left to install" -}}
{{- end -}}

{{- range $cluster := list "rayCluster" "endpoint" -}}
{{- $values := index $v $cluster -}}
{{- if $values.enabled -}}
{{- if and (eq $values.auth.mode "token") (semverCompare "<2.52.0-0" $v.rayVersion) -}}
{{- $wrong = append $wrong (printf "%s.auth.mode: token needs Ray 2.52.0 or newer, rayVersion is %s" $cluster $v.rayVersion) -}}
{{- end -}}
{{- if and $values.auth.existingSecret (ne $values.auth.mode "token") -}}
{{- $wrong = append $wrong (printf "%s.auth.existingSecret: only used with auth.mode token" $cluster) -}}
{{- end -}}
{{- if and $values.auth.existingSecret (semverCompare "<1.6.2-0" $kuberay) -}}
{{- $wrong = append $wrong (printf "%s.auth.existingSecret: KubeRay %s does not know it (1.6.2 does): leave it empty, or raise kuberayVersion" $cluster $kuberay) -}}
{{- end -}}
{{- if and $values.gcsFaultTolerance (not $v.redis.enabled) (not $v.redis.externalAddress) -}}
{{- $wrong = append $wrong (printf "%s.gcsFaultTolerance: needs a Redis: set redis.enabled or redis.externalAddress" $cluster) -}}
{{- end -}}
{{- range $env := $values.head.env | default list -}}
{{- if has $env.name (list "REDIS_PASSWORD" "RAY_REDIS_ADDRESS" "RAY_enable_autoscaler_v2") -}}
{{- $wrong = append $wrong (printf "%s.head.env: the operator refuses %s: use gcsFaultTolerance, redis and autoscaling" $cluster $env.name) -}}
{{- end -}}
{{- end -}}
{{- range $key := list "redis-password" "num-cpus" -}}
{{- if hasKey ($values.head.rayStartParams | default dict) $key -}}
{{- $wrong = append $wrong (printf "%s.head.rayStartParams.%s: the chart sets it; a head runs no tasks and its Redis comes from redis.*" $cluster $key) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and $v.redis.enabled $v.redis.externalAddress -}}
{{- $wrong = append $wrong "redis.externalAddress: set redis.enabled to false to use it" -}}
{{- end -}}

{{- if $v.rayCluster.enabled -}}
{{- if and $v.rayCluster.upgradeStrategy (semverCompare "<1.6.2-0" $kuberay) -}}
{{- $wrong = append $wrong (printf "rayCluster.upgradeStrategy: KubeRay %s does not know it (1.6.2 does): leave it empty, or raise kuberayVersion" $kuberay) -}}
{{- end -}}
{{- $groups := 0 -}}
{{- range $name, $group := $v.rayCluster.workerGroups -}}
{{- if and $group (ne (toString (dig "enabled" true ($group | default dict))) "false") -}}
{{- $groups = add1 $groups -}}
{{- $key := printf "rayCluster.workerGroups.%s" $name -}}
{{- if or (kindIs "invalid" $group.minReplicas) (kindIs "invalid" $group.maxReplicas) (not $group.resources) -}}
{{- $wrong = append $wrong (printf "%s: needs minReplicas, maxReplicas and resources" $key) -}}
{{- else -}}
{{- if gt (int $group.minReplicas) (int $group.maxReplicas) -}}
{{- $wrong = append $wrong (printf "%s.minReplicas: %v is more than maxReplicas %v" $key $group.minReplicas $group.maxReplicas) -}}
{{- end -}}
{{- if not (kindIs "invalid" $group.replicas) -}}
{{- if or (lt (int $group.replicas) (int $group.minReplicas)) (gt (int $group.replicas) (int $group.maxReplicas)) -}}
{{- $wrong = append $wrong (printf "%s.replicas: %v is not between minReplicas %v and maxReplicas %v" $key $group.replicas $group.minReplicas $group.maxReplicas) -}}
{{- end -}}
{{- end -}}
{{- $wrong = concat $wrong (fromJsonArray (include "altiplano.validate.resources" (dict "key" $key "resources" $group.resources))) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if eq (int $groups) 0 -}}
{{- $wrong = append $wrong "rayCluster.workerGroups: the head runs no tasks: at least one group must be enabled" -}}
{{- end -}}
{{- $wrong = concat $wrong (fromJsonArray (include "altiplano.validate.resources" (dict "key" "rayCluster.head" "resources" $v.rayCluster.head.resources))) -}}
{{- if and $v.kueue.queueName $v.rayCluster.autoscaling.enabled -}}
{{- $wrong = append $wrong "kueue.queueName: Kueue admits the cluster as a whole: set rayCluster.autoscaling.enabled to false" -}}
{{- end -}}
{{- end -}}

{{- with $v.endpoint -}}
{{- if .enabled -}}
{{- if gt (int .replicas.min) (int .replicas.max) -}}
{{- $wrong = append $wrong (printf "endpoint.replicas.min: %v is more than max %v" .replicas.min .replicas.max) -}}
{{- end -}}
{{- $gpus := dig "limits" "nvidia.com/gpu" 0 .worker.resources -}}
{{- if and (eq .engine.device "cuda") (lt (float64 .gpusPerReplica) 0.01) -}}
{{- $wrong = append $wrong "endpoint.gpusPerReplica: engine.device cuda needs a GPU; for a trial without one set engine.device to cpu" -}}
{{- end -}}
{{- if and (eq .engine.device "cpu") (gt (float64 .gpusPerReplica) 0.0) -}}
{{- $wrong = append $wrong "endpoint.gpusPerReplica: engine.device cpu uses none: set it to 0" -}}
{{- end -}}
{{- if gt (float64 .gpusPerReplica) (float64 $gpus) -}}
{{- $wrong = append $wrong (printf "endpoint.worker.resources.limits: %v GPUs a pod, a replica wants %v (endpoint.gpusPerReplica): it would wait for ever" $gpus .gpusPerReplica) -}}
{{- end -}}
{{- if and (eq .engine.device "cpu") (ne .engine.dtype "float32") -}}
{{- $wrong = append $wrong (printf "endpoint.engine.dtype: the CPU engine computes in float32, not %s" .engine.dtype) -}}
{{- end -}}
{{- range $alias, $adapter := .aliases -}}
{{- if not (hasKey $v.endpoint.adapters $adapter) -}}
{{- $wrong = append $wrong (printf "endpoint.aliases.%s: no adapter %q in endpoint.adapters" $alias $adapter) -}}
{{- end -}}
{{- end -}}
{{- $wrong = concat $wrong (fromJsonArray (include "altiplano.validate.resources" (dict "key" "endpoint.head" "resources" .head.resources))) -}}
{{- $wrong = concat $wrong (fromJsonArray (include "altiplano.validate.resources" (dict "key" "endpoint.worker" "resources" .worker.resources))) -}}
{{- if eq .upgradeStrategy "NewClusterWithIncrementalUpgrade" -}}
{{- if not .incrementalUpgrade.gatewayClassName -}}
{{- $wrong = append $wrong "endpoint.incrementalUpgrade.gatewayClassName: an incremental upgrade needs the Gateway API and the name of a GatewayClass" -}}
{{- end -}}
{{- if gt (int .incrementalUpgrade.stepSizePercent) (int .incrementalUpgrade.maxSurgePercent) -}}
{{- $wrong = append $wrong "endpoint.incrementalUpgrade.stepSizePercent: is more than maxSurgePercent" -}}
{{- end -}}
{{- if eq (int .replicas.min) (int .replicas.max) -}}
{{- $wrong = append $wrong "endpoint.replicas: an incremental upgrade needs autoscaling: max above min" -}}
{{- end -}}
{{- if or $v.ingress.endpoint.enabled $v.httpRoute.endpoint.enabled -}}
{{- $wrong = append $wrong "endpoint.upgradeStrategy: with incremental upgrades KubeRay makes the Gateway and its route: disable ingress.endpoint and httpRoute.endpoint" -}}
{{- end -}}
{{- end -}}
{{- if has (int .metricsPort) (list 6379 8000 8080 8265 10001 44217 44227) -}}
{{- $wrong = append $wrong (printf "endpoint.metricsPort: %d is a port of Ray's: take another" (int .metricsPort)) -}}
{{- end -}}
{{- if and .otlpEndpoint $v.networkPolicy.enabled (not (and $v.networkPolicy.traceCollectors.to $v.networkPolicy.traceCollectors.ports)) -}}
{{- $wrong = append $wrong "networkPolicy.traceCollectors: traces go to endpoint.otlpEndpoint: name the collector's pods in `to` and their ports" -}}
{{- end -}}
{{- if not .apiKeys -}}
{{- $wrong = append $wrong "endpoint.apiKeys: without keys the endpoint answers nobody but its own pod: leave it true, docs/install.md makes the keys" -}}
{{- end -}}
{{- if and (eq .engine.device "cuda") (ne .engine.dtype "bfloat16") -}}
{{- $wrong = append $wrong (printf "endpoint.engine.dtype: the GPU engine computes in bfloat16, not %s" .engine.dtype) -}}
{{- end -}}
{{- if and (eq .engine.device "cpu") (ne (.engine.kv_cache_dtype | default "auto") "auto") -}}
{{- $wrong = append $wrong "endpoint.engine.kv_cache_dtype: needs a GPU: leave it at auto with device cpu" -}}
{{- end -}}
{{- if and (eq .engine.device "cpu") (ne (.engine.quantization | default "none") "none") -}}
{{- $wrong = append $wrong "endpoint.engine.quantization: needs a GPU: leave it at none with device cpu" -}}
{{- end -}}
{{- if and (eq .engine.device "cpu") (ne (.engine.speculative_quantization | default "none") "none") -}}
{{- $wrong = append $wrong "endpoint.engine.speculative_quantization: needs a GPU: leave it at none with device cpu" -}}
{{- end -}}
{{- if and (ne (.engine.speculative_quantization | default "none") "none") (not .engine.speculative_model) -}}
{{- $wrong = append $wrong "endpoint.engine.speculative_quantization: has no endpoint.engine.speculative_model: name one, or leave it out" -}}
{{- end -}}
{{- if and (eq .engine.device "cuda") (gt (int (.engine.num_speculative_tokens | default 0)) 15) -}}
{{- $wrong = append $wrong (printf "endpoint.engine.num_speculative_tokens: a GPU checks at most 15 guesses in a step, not %d" (int .engine.num_speculative_tokens)) -}}
{{- end -}}
{{- if and .engine.deterministic (hasPrefix "w8a8" (.engine.quantization | default "none")) -}}
{{- $wrong = append $wrong (printf "endpoint.engine.deterministic: is not for quantization %s: use none, int8 or int4" .engine.quantization) -}}
{{- end -}}
{{- if and (eq (.engine.engine | default "altiplano") "vllm") (or (eq .engine.device "cpu") (not (has (.engine.quantization | default "none") (list "none" "w8a8-fp8")))) -}}
{{- $wrong = append $wrong "endpoint.engine.engine: vllm needs device cuda, and has no quantization but w8a8-fp8" -}}
{{- end -}}
{{- if and (eq (.engine.engine | default "altiplano") "vllm") (or .engine.num_speculative_tokens (hasKey .engine "itl_target_ms") .engine.deterministic) -}}
{{- $wrong = append $wrong "endpoint.engine.engine: vllm has neither num_speculative_tokens nor itl_target_ms nor deterministic: leave them out" -}}
{{- end -}}
{{- if and .engine.speculative_model (not .engine.num_speculative_tokens) -}}
{{- $wrong = append $wrong "endpoint.engine.speculative_model: guesses nothing: set endpoint.engine.num_speculative_tokens above 0" -}}
{{- end -}}
{{- $codes := list "int8" "int4" -}}
{{- if and (or (has .engine.quantization $codes) (has .engine.speculative_quantization $codes)) (eq (int (.engine.block_size | default 32)) 8) -}}
{{- $wrong = append $wrong "endpoint.engine.block_size: quantized weights need 16 or more" -}}
{{- end -}}
{{- if lt (int64 .engine.kv_cache_tokens) (int64 .engine.max_model_len) -}}
{{- $wrong = append $wrong (printf "endpoint.engine.kv_cache_tokens: %d hold no request of max_model_len %d" (int64 .engine.kv_cache_tokens) (int64 .engine.max_model_len)) -}}
{{- end -}}
{{- $delay := .rayClusterDeletionDelaySeconds -}}
{{- if and (not (kindIs "invalid" $delay)) (ne .upgradeStrategy "None") (lt (int $delay) (int .gracefulShutdownTimeoutSeconds)) -}}
{{- $wrong = append $wrong (printf "endpoint.rayClusterDeletionDelaySeconds: %d is less than gracefulShutdownTimeoutSeconds: streams on the former cluster would be cut" (int $delay)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- with $v.mlflow -}}
{{- if and .enabled .externalUri -}}
{{- $wrong = append $wrong "mlflow.externalUri: set mlflow.enabled to false to use it" -}}
{{- end -}}
{{- if .enabled -}}
{{- if and (eq .artifacts.type "s3") (not (hasPrefix "s3://" .artifacts.s3Uri)) -}}
{{- $wrong = append $wrong "mlflow.artifacts.s3Uri: type s3 needs s3://bucket/prefix" -}}
{{- end -}}
{{- if and (eq .artifacts.type "pvc") (gt (int .replicas) 1) (not (has "ReadWriteMany" .artifacts.accessModes)) -}}
{{- $wrong = append $wrong "mlflow.replicas: several servers need artifacts on s3, or a volume with ReadWriteMany" -}}
{{- end -}}
{{- if and $v.postgresql.enabled $v.postgresql.external.host -}}
{{- $wrong = append $wrong "postgresql.external.host: set postgresql.enabled to false to use it" -}}
{{- end -}}
{{- if not (or $v.postgresql.enabled $v.postgresql.external.host) -}}
{{- $wrong = append $wrong "postgresql.external.host: MLflow needs a database: name it, or set postgresql.enabled" -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and $v.backup.enabled (not $v.mlflow.enabled) -}}
{{- $wrong = append $wrong "backup.enabled: it dumps MLflow's database, and mlflow.enabled is false" -}}
{{- end -}}

{{- range $component := list "endpoint" "mlflow" -}}
{{- $ingress := index $v.ingress $component -}}
{{- $route := index $v.httpRoute $component -}}
{{- $on := (index $v $component).enabled -}}
{{- if and $ingress.enabled (not $on) -}}
{{- $wrong = append $wrong (printf "ingress.%s.enabled: %s is not enabled" $component $component) -}}
{{- end -}}
{{- if and $route.enabled (not $on) -}}
{{- $wrong = append $wrong (printf "httpRoute.%s.enabled: %s is not enabled" $component $component) -}}
{{- end -}}
{{- if and $ingress.enabled (not $ingress.host) -}}
{{- $wrong = append $wrong (printf "ingress.%s.host: needed" $component) -}}
{{- end -}}
{{- if and $ingress.enabled (not $ingress.tlsSecret) (not $ingress.insecure) -}}
{{- $wrong = append $wrong (printf "ingress.%s.tlsSecret: keys and passwords would cross the network in clear text: name a TLS Secret, or set insecure to true" $component) -}}
{{- end -}}
{{- if and $route.enabled (not $route.parentRefs) -}}
{{- $wrong = append $wrong (printf "httpRoute.%s.parentRefs: needed" $component) -}}
{{- end -}}
{{- if and $route.enabled (not $route.hostnames) -}}
{{- $wrong = append $wrong (printf "httpRoute.%s.hostnames: needed" $component) -}}
{{- end -}}
{{- end -}}

{{- /* Against a live cluster, where every namespace has this account. */ -}}
{{- if and $v.preflight (lookup "v1" "ServiceAccount" .Release.Namespace "default") -}}
{{- if and (or $v.rayCluster.enabled $v.endpoint.enabled) (not (.Capabilities.APIVersions.Has "ray.io/v1/RayCluster")) -}}
{{- $wrong = append $wrong "preflight: this cluster does not know ray.io/v1 RayCluster: install KubeRay first, or set kuberay-operator.enabled to true" -}}
{{- end -}}
{{- $missing := fromJsonArray (include "altiplano.secretKeys" .) -}}
{{- $secret := lookup "v1" "Secret" .Release.Namespace $v.secrets.name -}}
{{- if and $missing (not $secret) -}}
{{- $wrong = append $wrong (printf "preflight: no Secret %q in namespace %s: docs/install.md has the command that makes it" $v.secrets.name .Release.Namespace) -}}
{{- else if $secret -}}
{{- range $key, $_ := $secret.data -}}{{- $missing = without $missing $key -}}{{- end -}}
{{- if $missing -}}
{{- $wrong = append $wrong (printf "preflight: the Secret %q has no %s: pods would not start; docs/install.md has the command that makes it" $v.secrets.name (join ", " $missing)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- if $wrong -}}
{{- fail (printf "\n\nThese values cannot work:\n  - %s\n" (join "\n  - " $wrong)) -}}
{{- end -}}
{{- end -}}

{{/* A JSON list of the keys that pods and monitors of this release read from the Secret. */}}
{{- define "altiplano.secretKeys" -}}
{{- $keys := list -}}
{{- if .Values.endpoint.enabled -}}{{- $keys = append $keys "api-keys.json" -}}{{- end -}}
{{- if and .Values.endpoint.enabled .Values.monitoring.podMonitor.enabled -}}{{- $keys = append $keys "metrics-api-key" -}}{{- end -}}
{{- if .Values.mlflow.enabled -}}{{- $keys = concat $keys (list "mlflow-admin-password" "mlflow-flask-secret-key" "postgres-password") -}}{{- end -}}
{{- if include "altiplano.needsRedis" . -}}{{- $keys = append $keys "redis-password" -}}{{- end -}}
{{- $keys | toJson -}}
{{- end -}}

{{/* {key, resources}: a JSON list of what is wrong with a Ray container's resources. */}}
{{- define "altiplano.validate.resources" -}}
{{- $wrong := list -}}
{{- $requests := .resources.requests | default dict -}}
{{- $limits := .resources.limits | default dict -}}
{{- if not (and (hasKey $limits "memory") (hasKey $limits "cpu")) -}}
{{- $wrong = append $wrong (printf "%s.resources.limits: Ray takes its CPUs and memory from the limits: set both" .key) -}}
{{- end -}}
{{- if ne (toString $requests.memory) (toString $limits.memory) -}}
{{- $wrong = append $wrong (printf "%s.resources.requests.memory: must equal the limit: Ray fills what it was promised" .key) -}}
{{- end -}}
{{- range $name, $count := $requests -}}
{{- if hasSuffix "/gpu" $name -}}
{{- if ne (toString $count) (toString (index $limits $name)) -}}
{{- $wrong = append $wrong (printf "%s.resources.requests.%s: Kubernetes wants GPUs in the limits, with the same count" $.key $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $wrong | toJson -}}
{{- end -}}
