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
from altiplano.engine.weights import expected_shapes, read_tensor

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_KEY = re.compile(
    r"base_model\.model\.(model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+))\.lora_(A|B|magnitude_vector)(?:\.weight)?"
)
Pair = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Adapter:
    """`pairs[layer][module]` is (down [r, in], up [out, r], gain [out] or None) with the scale folded into `up`.

    An output becomes gain * (W x) + up (down x). Only DoRA has a gain: the learned magnitude over the norm of W + B A, row by row
    (Liu et al. 2024, arXiv 2402.09353), which is folded into `up` too.
    """

    name: str
    rank: int
    pairs: tuple[dict[str, Pair], ...]


def load_adapter(
    name: str, directory: Path, model: Path, config: LlamaConfig, max_rank: int, dtype: torch.dtype, device: str
) -> Adapter:
    """Read adapter_config.json and adapter_model.safetensors of `directory`; `model` is the base, whose weights DoRA needs.

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
    names: dict[tuple[int, str], str] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or match[3] not in MODULES:
            raise AdapterError(f"{directory} has tensor {key}: the engine runs LoRA on {', '.join(MODULES)} only")
        out_in = shapes.get(f"{match[1]}.weight")
        wanted = None if out_in is None else {"A": (rank, out_in[1]), "B": (out_in[0], rank)}.get(match[4], (out_in[0],))
        if tuple(tensor.shape) != wanted:
            raise AdapterError(
                f"{directory}: {key} is {tuple(tensor.shape)}, the loaded model needs {wanted}: the adapter belongs to another base model"
            )
        if not torch.isfinite(tensor).all():
            raise AdapterError(
                f"{directory}: {key} has values that are no numbers: its training has diverged, use an earlier checkpoint"
            )
        halves.setdefault((int(match[2]), match[3]), {})[match[4]] = tensor
        names[int(match[2]), match[3]] = f"{match[1]}.weight"
    parts = {"A", "B", "magnitude_vector"} if settings.get("use_dora") else {"A", "B"}
    pairs: list[dict[str, Pair]] = [{} for _ in range(config.num_hidden_layers)]
    for (layer, module), half in halves.items():
        if set(half) != parts:
            raise AdapterError(f"{directory}: layer {layer} {module} has only a part of its update: copy the adapter again")
        down, up, gain = half["A"], half["B"].float() * scale, None
        if settings.get("use_dora"):
            weight = read_tensor(model, names[layer, module], device).float()
            gain = half["magnitude_vector"].float() / torch.linalg.vector_norm(weight + up @ down.float(), dim=1)
            up = up * gain[:, None]
        pairs[layer][module] = (down.to(dtype).contiguous(), up.to(dtype).contiguous(), None if gain is None else gain.to(dtype))
    return Adapter(name, rank, tuple(pairs))


def _settings(directory: Path, max_rank: int) -> dict[str, Any]:
    path = directory / "adapter_config.json"
    try:
        settings: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read ({error}): the adapter must be a directory in PEFT's format") from error
    if settings.get("peft_type") != "LORA":
        raise AdapterError(f"{path} says peft_type {settings.get('peft_type')!r}: the engine runs LORA")
    if settings.get("init_lora_weights") not in (True, False, None, "gaussian"):
        raise AdapterError(
            f"{path} was initialised with {settings['init_lora_weights']!r}, which changes the base weights: convert it to plain LoRA with PEFT"
        )
    for feature in ("rank_pattern", "alpha_pattern", "modules_to_save"):
        if settings.get(feature):
            raise AdapterError(
                f"{path} uses {feature}, which the engine does not run: merge the adapter into its base and serve that"
            )
    if settings.get("bias", "none") != "none":
        raise AdapterError(f"{path} trains biases, which the engine does not run: train with bias='none'")
    if settings["r"] > max_rank:
        raise AdapterError(f"{path} has rank {settings['r']}, above max_lora_rank {max_rank}: raise max_lora_rank")
    return settings
