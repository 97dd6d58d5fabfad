"""The champion goes to the endpoint, and answers one held-out question before the stage counts as done."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from altiplano import spec
from altiplano.cluster.processes import require_free
from altiplano.data import Prepared
from altiplano.models.loading import resolve_model_path
from altiplano.models.manifest import verify_manifest
from altiplano.pipeline.context import Context, Stage
from altiplano.pipeline.ledger import Outputs, Record
from altiplano.pipeline.services import Services
from altiplano.pipeline.serving import hand_over, remote_control, remote_headers, serve_control
from altiplano.registry import ModelRegistry
from altiplano.serve import ServeSettings, deploy
from altiplano.serve.keys import KeyFile

CHAMPION = "champion"
ANSWER_TIMEOUT_S = 60.0
TEXT_PROMPT = 16  # tokens


class DeployError(RuntimeError):
    """The endpoint did not come up or did not answer."""

    exit_code = 4


def _inputs(context: Context) -> dict[str, Any]:
    return {"register": context.records["register"].digest, "serve": context.pipeline.serve.model_dump(mode="json")}


def _run(context: Context) -> Outputs:
    pipeline = context.pipeline
    name = context.registered_name
    if not pipeline.serve.enabled:
        return {"url": None, "reason": "serve.enabled is false"}
    registry = ModelRegistry(context.services.tracking_uri)
    champion = registry.get(name, CHAMPION)
    if champion is None:
        return {"url": None, "reason": "the registry has no champion, so nothing is deployed"}
    adapter = registry.download(name, champion.version, context.workspace.stage_dir("deploy") / f"{name}-{champion.version}")
    digest = context.outputs("data")["template_digest"]
    url = _url(pipeline.serve)
    context.progress("deploy", f"{name} version {champion.version} on {url}")
    served = f"{name}-{champion.version}"
    if pipeline.serve.remote is not None:
        control = remote_control(pipeline.serve.remote)
        hand_over(control, pipeline.model.model_name_or_path, served, str(adapter), CHAMPION)
    else:
        control = serve_control(context.services, context.workspace.root)
        if control.listening() != (pipeline.serve.host, pipeline.serve.port):
            require_free(pipeline.serve.host, pipeline.serve.port, "serve.port")
        deploy(_settings(pipeline, served, str(adapter), digest), pipeline.serve, control)
    question, answer = _ask(url, context)
    context.tracked.set_tags({"altiplano.endpoint": url, "altiplano.version": str(champion.version)})
    return {
        "url": url,
        "version": champion.version,
        "adapter_path": str(adapter),
        "template_digest": digest,
        "question": question,
        "answer": answer,
        "model": CHAMPION,
    }


def redeploy(pipeline: spec.Pipeline, record: Record, services: Services, root: Path) -> None:
    """Deploy again what an earlier run deployed here, without the registry. The endpoint of another cluster is not ours to start."""
    if pipeline.serve.remote is not None:
        return
    outputs = record.outputs
    verify_manifest(Path(outputs["adapter_path"]))
    served = Path(outputs["adapter_path"]).name
    deploy(
        _settings(pipeline, served, outputs["adapter_path"], outputs["template_digest"]),
        pipeline.serve,
        serve_control(services, root),
    )


def _url(serve: spec.Serve) -> str:
    return serve.remote.url.rstrip("/") if serve.remote else f"http://{serve.host}:{serve.port}/v1"


def _settings(pipeline: spec.Pipeline, served: str, adapter: str, template_digest: str) -> ServeSettings:
    return serve_settings(pipeline, str(resolve_model_path(pipeline.model)), served, adapter, template_digest)


def serve_settings(pipeline: spec.Pipeline, model: str, served: str, adapter: str, template_digest: str | None) -> ServeSettings:
    """What the pipeline file says about the endpoint. `model`: a directory, or a name that the replicas can resolve."""
    return ServeSettings(
        model_path=model,
        served_model_name=pipeline.model.model_name_or_path,
        adapters={served: adapter},
        aliases={CHAMPION: served},
        date_string=pipeline.data.date_string,
        template_digest=template_digest,
        engine=pipeline.serve.engine,
        dtype=pipeline.model.dtype,
        device="cuda" if pipeline.scaling.use_gpu else "cpu",
        max_model_len=pipeline.serve.max_model_len,
        max_num_seqs=pipeline.serve.max_num_seqs,
        max_num_batched_tokens=pipeline.serve.max_num_batched_tokens,
        block_size=pipeline.serve.block_size,
        kv_cache_tokens=pipeline.serve.kv_cache_tokens,
        kv_cache_dtype=pipeline.serve.kv_cache_dtype,
        quantization=pipeline.serve.quantization,
        num_speculative_tokens=pipeline.serve.num_speculative_tokens,
        speculative_model=pipeline.serve.speculative_model,
        speculative_quantization=pipeline.serve.speculative_quantization,
        itl_target_ms=pipeline.serve.itl_target_ms,
        deterministic=pipeline.serve.deterministic,
        enable_prefix_caching=pipeline.serve.enable_prefix_caching,
    )


def _ask(url: str, context: Context) -> tuple[str, str]:
    """The first held-out question and the endpoint's answer to it."""
    rows = Prepared.load(context.workspace.stage_dir("data")).eval_rows
    body: dict[str, Any] = {"model": CHAMPION, "max_tokens": context.pipeline.evaluate.max_new_tokens, "temperature": 0.0}
    row = next((row for row in rows if row.reference), None)
    if row is None:  # plain texts: let it go on with the beginning of one
        return _post(url, "completions", body | {"prompt": rows[0].input_ids[:TEXT_PROMPT]}, context)
    return _post(url, "chat/completions", body | {"messages": row.messages[:-1]}, context)


def _post(url: str, route: str, body: dict[str, Any], context: Context) -> tuple[str, str]:
    with _key(context) as headers:
        try:
            response = httpx.post(f"{url}/{route}", json=body, headers=headers, timeout=ANSWER_TIMEOUT_S)
        except httpx.HTTPError as error:
            raise DeployError(f"the endpoint did not answer a held-out question ({type(error).__name__}: {error})") from error
    if response.is_error:
        raise DeployError(f"the endpoint answered {response.status_code} to a held-out question: {response.text[:300]}")
    choice = response.json()["choices"][0]
    if "messages" in body:
        return body["messages"][-1]["content"], choice["message"]["content"] or json.dumps(choice["message"].get("tool_calls"))
    return "(a held-out text)", choice["text"]


@contextmanager
def _key(context: Context) -> Iterator[dict[str, str]]:
    """Headers that open the endpoint for as long as it is checked."""
    if context.pipeline.serve.remote is not None:
        yield remote_headers()
        return
    file = context.pipeline.serve.api_keys_file
    if file is None:
        yield {}
        return
    with KeyFile(Path(file)).lend("check of a deployment") as text:
        yield {"authorization": f"Bearer {text}"}


def _holds(context: Context, record: Record) -> bool:
    """A deployment is done only as long as its endpoint answers with the same version."""
    url = record.outputs["url"]
    if url is None:
        return True
    try:
        with _key(context) as headers:
            response = httpx.get(f"{url}/models", headers=headers, timeout=ANSWER_TIMEOUT_S)
        names = {entry["id"] for entry in response.json()["data"]}
    except (httpx.HTTPError, ValueError, KeyError):
        return False
    return f"{context.registered_name}-{record.outputs['version']}" in names


def _summary(outputs: Outputs) -> str:
    return f"{outputs['url']} serves version {outputs['version']}" if outputs["url"] else f"nothing deployed: {outputs['reason']}"


STAGE = Stage("deploy", _inputs, _run, _summary, _holds)
