"""What of vLLM's source our adapter stands on, read without importing it: `python tests/engine/vllm_signatures.py FOLDER VERSION`.

FOLDER is the package's (where its arg_utils and sampling_params are); vllm_signatures.json beside this file is made by it, and
test_vllm.py holds the tests' stand-in and our mapping against it. Make it again when the supported version changes.
"""

import ast
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).with_suffix(".json")
FIELDS = {
    "EngineArgs": "engine/arg_utils.py",
    "SamplingParams": "sampling_params.py",
    "StructuredOutputsParams": "sampling_params.py",
    "RequestOutputKind": "sampling_params.py",
    "LoRARequest": "lora/request.py",
    "Logprob": "logprobs.py",
    "CompletionOutput": "outputs.py",
    "RequestStateStats": "v1/metrics/stats.py",
    "Gauge": "v1/metrics/reader.py",
    "Metric": "v1/metrics/reader.py",
}
METHODS = {
    "LLMEngine": (
        "v1/engine/llm_engine.py",
        (
            "from_engine_args",
            "add_request",
            "abort_request",
            "step",
            "add_lora",
            "remove_lora",
            "sleep",
            "wake_up",
            "get_metrics",
        ),
    ),
    "RequestOutput": ("outputs.py", ("__init__",)),
    "Platform": ("platforms/interface.py", ("is_sleep_mode_available", "is_cumem_allocator_available")),
}
FUNCTIONS = {"tokens_input": "inputs/engine.py"}
VALUES = {
    "MaxLoRARanks": "config/lora.py",
    "CacheDType": "config/cache.py",
    "MAX_NUM_LOGIT_BIAS_TOKENS": "v1/worker/gpu/sample/logit_bias.py",
    "MAX_NUM_STOP_TOKEN_IDS": "v1/worker/gpu/sample/logit_bias.py",
    "FINISH_REASON_STRINGS": "v1/engine/__init__.py",
}
METRICS = ("v1/metrics/loggers.py", ("vllm:kv_cache_usage_perc", "vllm:num_requests_waiting", "vllm:num_preemptions"))


def read(folder: Path, version: str) -> dict[str, Any]:
    trees = {path: ast.parse((folder / path).read_text()) for path in _paths()}
    loggers = {node.value for node in ast.walk(trees[METRICS[0]]) if isinstance(node, ast.Constant)}
    return {
        "version": version,
        "fields": {name: _fields(_named(trees[path], name)) for name, path in FIELDS.items()},
        "methods": {
            f"{kind}.{name}": _parameters(_named(_named(trees[path], kind), name))
            for kind, (path, names) in METHODS.items()
            for name in names
        },
        "functions": {name: _parameters(_named(trees[path], name)) for name, path in FUNCTIONS.items()},
        "values": {name: _value(trees[path], name) for name, path in VALUES.items()},
        "metrics": [name for name in METRICS[1] if name in loggers],
    }


def _paths() -> set[str]:
    return {*FIELDS.values(), *(path for path, _ in METHODS.values()), *FUNCTIONS.values(), *VALUES.values(), METRICS[0]}


def _named(tree: Any, name: str) -> Any:
    return next(node for node in tree.body if getattr(node, "name", None) == name)


def _fields(kind: ast.ClassDef) -> list[str]:
    found = [node.target.id for node in kind.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    names = [node.targets[0] for node in kind.body if isinstance(node, ast.Assign)]
    return found + [name.id for name in names if isinstance(name, ast.Name)]


def _parameters(function: ast.FunctionDef) -> list[str]:
    """Names, those with a default followed by it: "priority=0"."""
    args = function.args
    plain = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(plain) - len(args.defaults)) + [*args.defaults]
    pairs = [*zip(plain, defaults, strict=True), *zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    return [
        name.arg + (f"={ast.unparse(default)}" if default else "") for name, default in pairs if name.arg not in ("self", "cls")
    ]


def _value(tree: ast.Module, name: str) -> Any:
    """Of a module's constant; of Literal[...] its choices."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            value = node.value
            return ast.literal_eval(value.slice if isinstance(value, ast.Subscript) else value)
    raise KeyError(name)


if __name__ == "__main__":
    HERE.write_text(json.dumps(read(Path(sys.argv[1]), sys.argv[2]), sort_keys=True) + "\n")
