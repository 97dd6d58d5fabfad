"""The values that every check renders: what users combine, and every template at least once."""

from .charts import Values, merged, values_file

MONITORING: Values = {
    "monitoring": {
        "podMonitor": {"enabled": True, "labels": {"release": "kube-prometheus-stack"}},
        "rules": {"enabled": True},
        "dashboards": {"enabled": True},
        "prometheusUrl": "http://prometheus.monitoring:9090",
        "grafanaUrl": "http://grafana.monitoring",
    }
}
OUTSIDE: Values = {
    "mlflow": {"artifacts": {"type": "s3", "s3Uri": "s3://llamas/mlflow"}, "replicas": 2},
    "objectStore": {"endpointUrl": "https://s3.example.com", "existingSecret": "s3"},
    "postgresql": {"enabled": False, "external": {"host": "db.example.com", "sslMode": "verify-full"}},
    "redis": {"enabled": False, "externalAddress": "redis.example.com:6379"},
    "secrets": {"hfToken": {"name": "hub"}},
    "imagePullSecrets": [{"name": "pull"}],
}
ROUTES: Values = {
    "ingress": {
        "endpoint": {"enabled": True, "className": "nginx", "host": "llama.example.com", "tlsSecret": "llama-tls"},
        "mlflow": {"enabled": True, "host": "mlflow.example.com", "insecure": True},
    },
    "httpRoute": {
        "endpoint": {
            "enabled": True,
            "hostnames": ["api.example.com"],
            "parentRefs": [{"name": "public", "namespace": "gateways"}],
        },
        "mlflow": {"enabled": True, "hostnames": ["runs.example.com"], "parentRefs": [{"name": "public"}]},
    },
}
DIGEST = "sha256:" + "a" * 64
SCHEDULING: Values = {
    "nodeSelector": {"pool": "a"},
    "tolerations": [{"key": "dedicated", "operator": "Equal", "value": "llama", "effect": "NoSchedule"}],
    "affinity": {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{"matchExpressions": [{"key": "pool", "operator": "Exists"}]}]
            }
        }
    },
    "podAnnotations": {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"},
}
RAY_SCHEDULING: Values = SCHEDULING | {
    "topologySpreadConstraints": [
        {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway", "labelSelector": {}}
    ],
    "priorityClassName": "batch",
    "runtimeClassName": "nvidia",
    "env": [{"name": "NCCL_DEBUG", "value": "WARN"}],
    "volumes": [{"name": "data", "emptyDir": {}}],
    "volumeMounts": [{"name": "data", "mountPath": "/data"}],
}

MATRIX: dict[str, Values] = {
    "default": {},
    "gpu": values_file("values-gpu.yaml"),
    "cpu-trial": values_file("values-cpu-trial.yaml"),
    "helm-owned": {"rayCluster": {"apply": "helm"}},
    "fixed-size": {
        "rayCluster": {"autoscaling": {"enabled": False}, "workerGroups": {"training": {"replicas": 2}}},
        "kueue": {"queueName": "gpus", "priorityClassName": "high"},
    },
    "no-auth": {"rayCluster": {"auth": {"mode": "disabled"}}, "endpoint": {"auth": {"mode": "disabled"}}},
    "jobs-survive-heads": {"rayCluster": {"gcsFaultTolerance": True}, "endpoint": {"enabled": False}},
    "jobs-only": {
        "endpoint": {"enabled": False},
        "mlflow": {"enabled": False, "externalUri": "https://mlflow.example.com"},
        "redis": {"enabled": False},
    },
    "endpoint-only": {
        "rayCluster": {"enabled": False},
        "mlflow": {"enabled": False},
        "endpoint": {"replicas": {"min": 2, "max": 2}, "haProxy": False, "routing": "session"},
    },
    "tuned-endpoint": {
        "endpoint": {
            "engine": {
                "max_num_seqs": 512,
                "max_num_batched_tokens": 16384,
                "kv_cache_tokens": 1500000,
                "kv_cache_dtype": "fp8",
                "quantization": "int4",
                "block_size": 16,
                "enable_prefix_caching": False,
                "date_string": "1 Nov 2026",
                "template_digest": "a" * 64,
                "num_speculative_tokens": 15,
                "speculative_model": "cria",
                "speculative_quantization": "int8",
                "itl_target_ms": 12.5,
                "deterministic": True,
            },
            "servedModelName": "llama",
            "replicas": {"min": 0, "max": 8},
            "targetOngoingRequests": 100.5,
            "targetKvCacheUsage": 0.7,
            "targetTtftSeconds": 0.5,
            "upscaleDelaySeconds": 5,
            "downscaleDelaySeconds": 60,
            "downscaleToZeroDelaySeconds": 120,
            "limits": {
                "requests_per_minute": 600,
                "tokens_per_minute": 2000000,
                "max_concurrency": 32,
                "max_queued_seqs": 128,
                "max_body_bytes": 4194304,
                "max_header_bytes": 8192,
                "max_json_depth": 16,
                "max_json_values": 1048576,
                "max_schema_depth": 8,
                "max_schema_values": 1024,
                "body_timeout_s": 12.5,
                "stalled_client_timeout_s": 20,
            },
            "responseCacheBytes": 268435456,
            "healthCheckTimeoutSeconds": 45,
            "gracefulShutdownTimeoutSeconds": 900,
            "routing": "session",
            "usdPerHour": 0,
            "metricsPort": 9700,
            "otlpEndpoint": "http://collector:4318",
            "cpusPerReplica": 3,
        }
    },
    "mlflow-only": {"rayCluster": {"enabled": False}, "endpoint": {"enabled": False}},
    "monitoring": merged(MONITORING, {"backup": {"enabled": True}, "podDisruptionBudget": {"training": {"enabled": True}}}),
    "outside": merged(OUTSIDE, {"backup": {"enabled": True, "existingClaim": "backups"}}),
    "routes": ROUTES,
    "air-gap": {
        "image": {"registry": "registry.internal:5000", "repository": "mirror/altiplano", "digest": DIGEST},
        "postgresql": {"image": {"registry": "registry.internal:5000", "digest": DIGEST}},
        "redis": {"image": {"registry": "registry.internal:5000", "digest": DIGEST}},
        "hubOffline": True,
        "networkPolicy": {"httpsEgressCidrs": []},
    },
    "open-network": {
        "networkPolicy": {"enabled": False},
        "helmTest": {"enabled": False},
        "podDisruptionBudget": {"endpoint": {"enabled": False}},
    },
    "placed": {
        "commonLabels": {"team": "llamas"},
        "mlflow": SCHEDULING,
        "postgresql": SCHEDULING,
        "redis": SCHEDULING,
        "rayCluster": {
            "head": RAY_SCHEDULING,
            "workerGroups": {
                "training": RAY_SCHEDULING | {"customResources": {"H200": 1}, "idleTimeoutSeconds": 60, "numOfHosts": 2}
            },
        },
        "endpoint": {"head": RAY_SCHEDULING, "worker": RAY_SCHEDULING},
    },
    "own-groups": {
        "rayCluster": {
            "workerGroups": {
                "training": None,
                "preprocessing": {"enabled": False},
                "big": {
                    "minReplicas": 1,
                    "maxReplicas": 1,
                    "resources": {"requests": {"cpu": "1", "memory": "4Gi"}, "limits": {"cpu": "1", "memory": "4Gi"}},
                },
            },
            "extraSpec": {"headServiceAnnotations": {"team": "llamas"}},
        }
    },
    "adapters": {
        "endpoint": {
            "usdPerHour": 3.5,
            "otlpEndpoint": "http://collector:4318",
            "adapters": {"orders-7": "/workspace/adapters/orders-7"},
            "aliases": {"champion": "orders-7"},
        }
    },
    "long-name": {"fullnameOverride": "a-name-that-is-as-long-as-we-take"},
    "extra": {
        "extraObjects": [
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "{{ .Release.Name }}-extra"}, "data": {}},
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: text}\ndata: {}\n",
        ]
    },
}
# Fields that need a newer KubeRay, with the version that has them.
NEWER: dict[str, tuple[str, Values]] = {
    "own-token": (
        "1.6.2",
        {"kuberayVersion": "1.6.2", "rayCluster": {"auth": {"existingSecret": "token"}, "upgradeStrategy": "Recreate"}},
    ),
    "incremental": (
        "1.5.1",
        {
            "kuberayVersion": "1.5.1",
            "endpoint": {
                "upgradeStrategy": "NewClusterWithIncrementalUpgrade",
                "incrementalUpgrade": {"gatewayClassName": "istio"},
            },
        },
    ),
}
