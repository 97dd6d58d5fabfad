"""`altiplano deploy`: the RayService from a pipeline file and a registry alias, with a plan before anything is applied."""

from typing import Any

import pytest
import yaml
from conftest import FILE
from ray.serve.schema import ServeDeploySchema
from support import charts, crds, operator_rules
from support.charts import Object

from altiplano import spec
from altiplano.cluster.diff import Effect, plan
from altiplano.cluster.rayservice import RenderError, patch_of, serve_config, user_config, with_model, with_user_config
from altiplano.pipeline.serving import with_adapter
from altiplano.pipeline.stages.deploy import serve_settings
from altiplano.serve.application import parse
from altiplano.serve.application import serve_config as wanted_config


@pytest.fixture
def service(objects: list[Object]) -> Object:
    (found,) = charts.of_kind(objects, "RayService")
    return found


def _rendered(service: Object, **serve: Any) -> Object:
    pipeline = spec.Pipeline.model_validate({**FILE, "serve": {**FILE["serve"], **serve}})
    settings = serve_settings(pipeline, pipeline.model.model_name_or_path, "orders-3", "/workspace/adapters/orders-3", None)
    made = with_model(service, wanted_config(settings, pipeline.serve))
    return with_user_config(made, with_adapter(user_config(service), "orders-3", "/workspace/adapters/orders-3", "champion"))


def test_the_file_decides_what_is_served_and_the_release_where(service: Object) -> None:
    before, after = serve_config(service), serve_config(_rendered(service))
    (old,), (new,) = before["applications"], after["applications"]
    assert (after["proxy_location"], after["http_options"]) == (before["proxy_location"], before["http_options"])
    assert new["args"]["max_model_len"] == 4096 and new["args"]["api_keys_file"] == old["args"]["api_keys_file"]
    (deployment,) = new["deployments"]
    assert deployment["ray_actor_options"] == old["deployments"][0]["ray_actor_options"]
    assert deployment["max_replicas_per_node"] == 1
    assert deployment["user_config"]["aliases"] == {"champion": "orders-3"}
    ServeDeploySchema.model_validate(after)
    assert plan(service, _rendered(service)).effects[-1] is Effect.rolls


def test_our_endpoint_takes_the_arguments(service: Object) -> None:
    (application,) = serve_config(_rendered(service))["applications"]
    _, endpoint = parse({**application["args"], "model": "cria"})
    assert endpoint.max_num_seqs == 128


@pytest.mark.parametrize("version", crds.KUBERAY_VERSIONS)
def test_kuberay_takes_the_service(service: Object, version: str) -> None:
    if crds.folder() is None:
        pytest.skip("no CRD files: set ALTIPLANO_CRDS, or run `make crds` where a network is")
    made = _rendered(service)
    assert crds.kuberay(version).problems(made) == [] and operator_rules.broken(made) == []
    assert patch_of(made)["spec"].keys() == {"serveConfigV2"}, "the rest stays the chart's"


def test_an_adapter_alone_changes_in_place(service: Object) -> None:
    adapters = {
        "adapters": {"orders-1": "/a", "orders-2": "/b", "other-7": "/c"},
        "aliases": {"champion": "orders-2", "previous": "orders-1"},
    }
    present = with_user_config(service, adapters)
    made = with_user_config(present, with_adapter(user_config(present), "orders-3", "/d", "champion"))
    assert plan(present, made).effects == [Effect.in_place]
    assert user_config(made)["adapters"] == {"orders-1": "/a", "other-7": "/c", "orders-3": "/d"}, (
        "orders-2 has no alias any more"
    )
    assert plan(made, made).changes == ()


def test_more_replicas_than_pods_are_refused(service: Object) -> None:
    with pytest.raises(RenderError, match=r"endpoint\.replicas\.max"):
        _rendered(service, autoscaling={"max_replicas": 3})
    several = yaml.safe_dump({"applications": [{"name": "a"}, {"name": "b"}]})
    with pytest.raises(RenderError, match="a, b"):
        _rendered({**service, "spec": {**service["spec"], "serveConfigV2": several}})
