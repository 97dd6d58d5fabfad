"""Values that cannot work are refused, and the message names the key."""

from pathlib import Path

import pytest
from support import charts
from support.charts import Values

GB = {"cpu": "1", "memory": "4Gi"}
WRONG: list[tuple[str, Values]] = [
    # Words that no key has, at every depth.
    ("raycluster", {"raycluster": {}}),
    ("aply", {"rayCluster": {"aply": "hook"}}),
    ("minReplica", {"rayCluster": {"workerGroups": {"training": {"minReplica": 1}}}}),
    ("max_model_length", {"endpoint": {"engine": {"max_model_length": 1}}}),
    ("toleration", {"rayCluster": {"head": {"toleration": []}}}),
    ("enable", {"mlflow": {"enable": False}}),
    ("effects", {"rayCluster": {"head": {"tolerations": [{"key": "x", "effects": "NoSchedule"}]}}}),
    # Wrong types and ranges.
    ("apply", {"rayCluster": {"apply": "kubectl"}}),
    ("maxReplicas", {"rayCluster": {"workerGroups": {"training": {"maxReplicas": "4"}}}}),
    ("minReplicas", {"rayCluster": {"workerGroups": {"training": {"minReplicas": -1}}}}),
    ("num-cpus", {"rayCluster": {"workerGroups": {"training": {"rayStartParams": {"num-cpus": 4}}}}}),
    ("workerGroups", {"rayCluster": {"workerGroups": {"Training_A": {}}}}),
    ("mode", {"rayCluster": {"auth": {"mode": "kubernetes"}}}),
    ("upscalingMode", {"rayCluster": {"autoscaling": {"upscalingMode": "Fast"}}}),
    ("tag", {"image": {"tag": "latest"}}),
    ("digest", {"image": {"digest": "sha256:abc"}}),
    ("pullPolicy", {"image": {"pullPolicy": "Sometimes"}}),
    ("repository", {"image": {"repository": "Altiplano"}}),
    ("runAsUser", {"podSecurity": {"runAsUser": 0}}),
    ("app.kubernetes.io/name", {"commonLabels": {"app.kubernetes.io/name": "mine"}}),
    ("kuberayVersion", {"kuberayVersion": "1.7"}),
    ("size", {"storage": {"modelCache": {"size": "100"}}}),
    ("accessModes", {"storage": {"workspace": {"accessModes": ["RWX"]}}}),
    ("memory", {"mlflow": {"resources": {"requests": GB, "limits": {"cpu": "1", "memory": "4 GB"}}}}),
    ("importPath", {"endpoint": {"importPath": "altiplano.serve.application"}}),
    ("dtype", {"endpoint": {"engine": {"dtype": "fp4"}}}),
    ("kv_cache_dtype", {"endpoint": {"engine": {"kv_cache_dtype": "fp4"}}}),
    ("max_queued", {"endpoint": {"limits": {"max_queued": 3}}}),
    ("tokens_per_minute", {"endpoint": {"limits": {"tokens_per_minute": 0}}}),
    ("routing", {"endpoint": {"routing": "random"}}),
    ("targetKvCacheUsage", {"endpoint": {"targetKvCacheUsage": 80}}),
    ("responseCacheBytes", {"endpoint": {"responseCacheBytes": "1Gi"}}),
    ("sslMode", {"postgresql": {"external": {"sslMode": "on"}}}),
    ("s3Uri", {"mlflow": {"artifacts": {"s3Uri": "gs://bucket"}}}),
    ("cidr", {"networkPolicy": {"apiServer": {"cidr": "10.0.0.1"}}}),
    ("schedule", {"backup": {"schedule": "hourly"}}),
    ("errorRatio", {"monitoring": {"rules": {"thresholds": {"errorRatio": 5}}}}),
    ("externalAddress", {"redis": {"externalAddress": "redis://x"}}),
    ("fullnameOverride", {"fullnameOverride": "x" * 34}),
    # Values that are right one by one.
    ("kuberayVersion", {"kuberayVersion": "1.4.2"}),
    ("rayCluster.auth.mode", {"rayVersion": "2.51.0"}),
    ("rayCluster.auth.existingSecret", {"kuberayVersion": "1.5.1", "rayCluster": {"auth": {"existingSecret": "token"}}}),
    ("endpoint.auth.existingSecret", {"endpoint": {"auth": {"mode": "disabled", "existingSecret": "token"}}}),
    ("rayCluster.upgradeStrategy", {"kuberayVersion": "1.5.1", "rayCluster": {"upgradeStrategy": "Recreate"}}),
    ("endpoint.gcsFaultTolerance", {"redis": {"enabled": False}}),
    ("redis.externalAddress", {"redis": {"externalAddress": "redis:6379"}}),
    ("rayCluster.head.env", {"rayCluster": {"head": {"env": [{"name": "RAY_REDIS_ADDRESS", "value": "x"}]}}}),
    ("rayCluster.head.rayStartParams.num-cpus", {"rayCluster": {"head": {"rayStartParams": {"num-cpus": "2"}}}}),
    ("rayCluster.workerGroups.training.minReplicas", {"rayCluster": {"workerGroups": {"training": {"minReplicas": 9}}}}),
    ("rayCluster.workerGroups.training.replicas", {"rayCluster": {"workerGroups": {"training": {"replicas": 9}}}}),
    ("rayCluster.workerGroups.extra", {"rayCluster": {"workerGroups": {"extra": {"minReplicas": 1}}}}),
    ("rayCluster.workerGroups", {"rayCluster": {"workerGroups": {"training": None, "preprocessing": None, "inference": None}}}),
    ("rayCluster.head.resources.requests.memory", {"rayCluster": {"head": {"resources": {"requests": {"memory": "4Gi"}}}}}),
    (
        "rayCluster.workerGroups.training.resources.limits",
        {"rayCluster": {"workerGroups": {"training": {"resources": {"limits": {"cpu": None}}}}}},
    ),
    (
        "rayCluster.workerGroups.training.resources.requests.nvidia.com/gpu",
        {"rayCluster": {"workerGroups": {"training": {"resources": {"requests": {"nvidia.com/gpu": 2}}}}}},
    ),
    ("kueue.queueName", {"kueue": {"queueName": "gpus"}}),
    ("endpoint.replicas.min", {"endpoint": {"replicas": {"min": 3}}}),
    ("endpoint.gpusPerReplica", {"endpoint": {"gpusPerReplica": 0}}),
    ("endpoint.gpusPerReplica", {"endpoint": {"engine": {"device": "cpu", "dtype": "float32"}}}),
    ("endpoint.engine.dtype", {"endpoint": {"engine": {"device": "cpu"}, "gpusPerReplica": 0}}),
    ("endpoint.worker.resources.limits", {"endpoint": {"gpusPerReplica": 2}}),
    ("endpoint.aliases.champion", {"endpoint": {"aliases": {"champion": "orders-7"}}}),
    ("endpoint.incrementalUpgrade.gatewayClassName", {"endpoint": {"upgradeStrategy": "NewClusterWithIncrementalUpgrade"}}),
    ("endpoint.apiKeys", {"endpoint": {"apiKeys": False}}),
    ("endpoint.metricsPort", {"endpoint": {"metricsPort": 8265}}),
    (
        "networkPolicy.traceCollectors",
        {"endpoint": {"otlpEndpoint": "http://c:4318"}, "networkPolicy": {"traceCollectors": {"to": []}}},
    ),
    ("endpoint.engine.dtype: the GPU engine", {"endpoint": {"engine": {"dtype": "float16"}}}),
    (
        "endpoint.engine.kv_cache_dtype",
        {"endpoint": {"engine": {"device": "cpu", "kv_cache_dtype": "int8"}, "gpusPerReplica": 0}},
    ),
    ("endpoint.engine.quantization", {"endpoint": {"engine": {"device": "cpu", "quantization": "int4"}, "gpusPerReplica": 0}}),
    ("endpoint.engine.block_size", {"endpoint": {"engine": {"quantization": "int8", "block_size": 8}}}),
    ("endpoint.engine.num_speculative_tokens", {"endpoint": {"engine": {"num_speculative_tokens": 16}}}),
    ("num_speculative_tokens", {"endpoint": {"engine": {"num_speculative_tokens": 33}}}),
    ("endpoint.engine.engine", {"endpoint": {"engine": {"engine": "vllm", "quantization": "int4"}}}),
    (
        "endpoint.engine.engine: vllm has neither num_spec",
        {"endpoint": {"engine": {"engine": "vllm", "num_speculative_tokens": 4}}},
    ),
    ("endpoint.engine.engine: vllm has neither num_spec", {"endpoint": {"engine": {"engine": "vllm", "itl_target_ms": 20}}}),
    ("endpoint.engine.engine: vllm has neither num_spec", {"endpoint": {"engine": {"engine": "vllm", "deterministic": True}}}),
    ("itl_target_ms", {"endpoint": {"engine": {"itl_target_ms": 0}}}),
    ("endpoint.engine.deterministic", {"endpoint": {"engine": {"deterministic": True, "quantization": "w8a8-int8"}}}),
    (
        "endpoint.engine.speculative_quantization: has no",
        {"endpoint": {"engine": {"num_speculative_tokens": 4, "speculative_quantization": "int4"}}},
    ),
    (
        "endpoint.engine.speculative_quantization: needs a GPU",
        {"endpoint": {"engine": {"device": "cpu", "dtype": "float32", "speculative_quantization": "int4"}, "gpusPerReplica": 0}},
    ),
    (
        "endpoint.engine.block_size",
        {
            "endpoint": {
                "engine": {
                    "num_speculative_tokens": 4,
                    "speculative_model": "/models/1b",
                    "speculative_quantization": "int8",
                    "block_size": 8,
                }
            }
        },
    ),
    (
        "endpoint.engine.speculative_model",
        {"endpoint": {"engine": {"device": "cpu", "dtype": "float32", "speculative_model": "/models/1b"}, "gpusPerReplica": 0}},
    ),
    ("endpoint.engine.kv_cache_tokens", {"endpoint": {"engine": {"kv_cache_tokens": 4096}}}),
    ("endpoint.rayClusterDeletionDelaySeconds", {"endpoint": {"rayClusterDeletionDelaySeconds": 60}}),
    ("mlflow.externalUri", {"mlflow": {"externalUri": "https://mlflow.example.com"}}),
    ("mlflow.artifacts.s3Uri", {"mlflow": {"artifacts": {"type": "s3"}}}),
    ("mlflow.replicas", {"mlflow": {"replicas": 2}}),
    ("postgresql.external.host", {"postgresql": {"enabled": False}}),
    ("postgresql.external.host", {"postgresql": {"external": {"host": "db.example.com"}}}),
    ("backup.enabled", {"backup": {"enabled": True}, "mlflow": {"enabled": False}}),
    ("ingress.endpoint.host", {"ingress": {"endpoint": {"enabled": True, "tlsSecret": "t"}}}),
    ("ingress.mlflow.tlsSecret", {"ingress": {"mlflow": {"enabled": True, "host": "a.b"}}}),
    (
        "ingress.mlflow.enabled",
        {"mlflow": {"enabled": False}, "ingress": {"mlflow": {"enabled": True, "host": "a.b", "tlsSecret": "t"}}},
    ),
    ("httpRoute.endpoint.parentRefs", {"httpRoute": {"endpoint": {"enabled": True, "hostnames": ["a.b"]}}}),
    ("httpRoute.endpoint.hostnames", {"httpRoute": {"endpoint": {"enabled": True, "parentRefs": [{"name": "g"}]}}}),
    ("nothing is left", {"rayCluster": {"enabled": False}, "endpoint": {"enabled": False}, "mlflow": {"enabled": False}}),
]


@pytest.mark.parametrize(("key", "values"), WRONG, ids=[f"{i}-{key}" for i, (key, _) in enumerate(WRONG)])
def test_helm_4_refuses_and_names_the_key(chart: Path, helm4: charts.Helm4, key: str, values: Values) -> None:
    with pytest.raises(charts.RefusedError) as refusal:
        helm4.template(chart, values)
    assert key in str(refusal.value)


@pytest.mark.parametrize(("key", "values"), WRONG, ids=[f"{i}-{key}" for i, (key, _) in enumerate(WRONG)])
def test_helm_3_refuses_and_names_the_key(chart: Path, helm3: charts.Helm3, key: str, values: Values) -> None:
    with pytest.raises(charts.RefusedError) as refusal:
        helm3.template(chart, values)
    assert key in str(refusal.value)


def test_everything_that_is_wrong_is_said_at_once(chart: Path, helm4: charts.Helm4) -> None:
    with pytest.raises(charts.RefusedError) as refusal:
        helm4.template(chart, {"endpoint": {"replicas": {"min": 3}}, "backup": {"enabled": True}, "mlflow": {"enabled": False}})
    assert "endpoint.replicas.min: 3 is more than max 2" in str(refusal.value)
    assert "backup.enabled: it dumps MLflow's database" in str(refusal.value)
