"""The endpoint's values in the words of the pipeline file, and the Serve config that our own code makes of them."""

from pathlib import Path
from typing import Any

import yaml

from altiplano import spec
from altiplano.serve.application import serve_config
from altiplano.serve.proxy import proxy_environment
from altiplano.serve.settings import ServeSettings

from . import charts
from .charts import Values

KEYS_FILE = "/etc/altiplano/keys/api-keys.json"
# A pod has ports of its own, so HAProxy's statistics stay where Ray puts them.
OF_THE_MACHINE = ("RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_HAPROXY_METRICS_PORT")
# What a place gives: one replica per pod, and as much of it as the pod has.
OF_THE_PLACE = ("ray_actor_options", "max_replicas_per_node")


def endpoint_values(chart: Path, values: Values) -> Values:
    """`endpoint` of the chart's values with these laid over them."""
    defaults: Values = yaml.load((chart / "values.yaml").read_text(), yaml.CSafeLoader)
    endpoint: Values = charts.merged(defaults, values)["endpoint"]
    return endpoint


def generated(endpoint: Values) -> dict[str, Any]:
    """What `altiplano deploy` and the pipeline would deploy for the same settings."""
    return serve_config(*_settings(endpoint))


def generated_environment(endpoint: Values) -> dict[str, str]:
    """Environment variables of Serve's processes for the same settings."""
    made = proxy_environment(_settings(endpoint)[1])
    return {name: value for name, value in made.items() if name not in OF_THE_MACHINE}


def _settings(endpoint: Values) -> tuple[ServeSettings, spec.Serve]:
    """Key by key: the one place where the chart's names meet the pipeline file's."""
    settings = ServeSettings(
        model_path=endpoint["model"],
        served_model_name=endpoint["servedModelName"] or endpoint["model"].rsplit("/", 1)[-1].lower(),
        adapters=endpoint["adapters"],
        aliases=endpoint["aliases"],
        **endpoint["engine"],
    )
    return settings, spec.Serve.model_validate(
        {
            "host": "0.0.0.0",
            "port": 8000,
            "max_num_seqs": settings.max_num_seqs,
            "api_keys_file": KEYS_FILE,
            "limits": endpoint["limits"],
            "response_cache_bytes": endpoint["responseCacheBytes"],
            "usd_per_hour": endpoint["usdPerHour"],
            "otlp_endpoint": endpoint["otlpEndpoint"] or None,
            "metrics_port": endpoint["metricsPort"],
            "http_proxy": "haproxy" if endpoint["haProxy"] else "python",
            "routing": endpoint["routing"],
            "graceful_shutdown_timeout_s": endpoint["gracefulShutdownTimeoutSeconds"],
            "health_check_timeout_s": endpoint["healthCheckTimeoutSeconds"],
            "autoscaling": {
                "min_replicas": endpoint["replicas"]["min"],
                "max_replicas": endpoint["replicas"]["max"],
                "target_num_seqs": endpoint["targetOngoingRequests"],
                "target_kv_cache_usage": endpoint["targetKvCacheUsage"],
                "target_ttft_s": endpoint["targetTtftSeconds"],
                "upscale_delay_s": endpoint["upscaleDelaySeconds"],
                "downscale_delay_s": endpoint["downscaleDelaySeconds"],
                "downscale_to_zero_delay_s": endpoint["downscaleToZeroDelaySeconds"],
            },
        }
    )
