"""LoRA adapters in PEFT's layout, checked against the base before the first token."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from altiplano.engine.config import LlamaConfig
from altiplano.engine.errors import AdapterError
from altiplano.engine.weights import expected_shapes

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_KEY = re.compile(r"base_model\.model\.(model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+))\.lora_([AB])\.weight")


@dataclass(frozen=True)
class Adapter:
    """`pairs[layer][module]` is (down [r, in], up [out, r]) with the scale folded into `up`."""

    name: str
    rank: int
    pairs: tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], ...]


def load_adapter(name: str, directory: Path, config: LlamaConfig, max_rank: int, dtype: torch.dtype, device: str) -> Adapter:
    """Read adapter_config.json and adapter_model.safetensors of `directory`.

    Raises:
        AdapterError: unreadable, of a kind that the engine does not run, above `max_rank`, or made for another base.
    """
    settings = _settings(directory, max_rank)
    try:
        tensors = load_file(directory / "adapter_model.safetensors", device=device)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{directory}/adapter_model.safetensors cannot be read ({error}): copy the adapter again") from error
    rank = settings["r"]
    scale = settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)
    shapes = dict(expected_shapes(config))
    halves: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or match[3] not in MODULES:
            raise AdapterError(f"{directory} has tensor {key}: the engine runs LoRA on {', '.join(MODULES)} only")
        out_in = shapes.get(f"{match[1]}.weight")
        wanted = None if out_in is None else ((rank, out_in[1]) if match[4] == "A" else (out_in[0], rank))
        if tuple(tensor.shape) != wanted:
            raise AdapterError(
                f"{directory}: {key} is {tuple(tensor.shape)}, the loaded model needs {wanted}: the adapter belongs to another base model"
            )
        halves.setdefault((int(match[2]), match[3]), {})[match[4]] = tensor.to(dtype)
    pairs: list[dict[str, tuple[torch.Tensor, torch.Tensor]]] = [{} for _ in range(config.num_hidden_layers)]
    for (layer, module), half in halves.items():
        if set(half) != {"A", "B"}:
            raise AdapterError(f"{directory}: layer {layer} {module} has only one half of its update: copy the adapter again")
        pairs[layer][module] = (half["A"].contiguous(), (half["B"] * scale).contiguous())
    return Adapter(name, rank, tuple(pairs))


def _settings(directory: Path, max_rank: int) -> dict[str, Any]:
    path = directory / "adapter_config.json"
    try:
        settings: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read ({error}): the adapter must be a directory in PEFT's format") from error
    if settings.get("peft_type") != "LORA":
        raise AdapterError(f"{path} says peft_type {settings.get('peft_type')!r}: the engine runs LORA")
    for feature in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"):
        if settings.get(feature):
            raise AdapterError(
                f"{path} uses {feature}, which the engine does not run: merge the adapter into its base and serve that"
            )
    if settings.get("bias", "none") != "none":
        raise AdapterError(f"{path} trains biases, which the engine does not run: train with bias='none'")
    if settings["r"] > max_rank:
        raise AdapterError(f"{path} has rank {settings['r']}, above max_lora_rank {max_rank}: raise max_lora_rank")
    return settings
