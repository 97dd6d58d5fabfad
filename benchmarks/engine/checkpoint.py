"""A checkpoint of random weights at a public Llama 3.2 shape, laid out as Hugging Face does: config.json and bf16 safetensors.

usage: python benchmarks/engine/checkpoint.py MODEL FOLDER
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from definitions import model_config
from safetensors.torch import save_file

SHARD_BYTES = 5_000_000_000
SPREAD = 0.02  # standard deviation, Llama's initializer_range


def shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor; the head is tied to the embedding."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    query, key = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for index in range(config["num_hidden_layers"]):
        for name, shape in {
            "input_layernorm": (hidden,), "self_attn.q_proj": (query, hidden), "self_attn.k_proj": (key, hidden),
            "self_attn.v_proj": (key, hidden), "self_attn.o_proj": (hidden, query), "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide),
        }.items():  # fmt: skip
            yield f"model.layers.{index}.{name}.weight", shape
    yield "model.norm.weight", (hidden,)


def write_checkpoint(config: Mapping[str, Any], where: Path, shard_bytes: int = SHARD_BYTES, seed: int = 0) -> None:
    """Norms are ones, all else normal with standard deviation `SPREAD`; files of at most `shard_bytes`, with their index."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    where.mkdir(parents=True, exist_ok=True)
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes(config):
        nbytes = 2 * torch.Size(shape).numel()
        if groups[-1] and size + nbytes > shard_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += nbytes
    files = {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}
    if len(groups) == 1:
        files = {"model.safetensors": groups[0]}
    for file, group in files.items():
        made = {}
        for name, shape in group.items():
            tensor = torch.ones(shape, dtype=torch.bfloat16)
            if not name.endswith("norm.weight"):
                # Straight into bf16: float32 of a whole embedding would need twice the memory.
                tensor = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, SPREAD, generator=generator).cpu()
            made[name] = tensor
        save_file(made, where / file, metadata={"format": "pt"})
    if len(groups) > 1:
        weight_map = {name: file for file, group in files.items() for name in group}
        total = sum(2 * torch.Size(shape).numel() for _, shape in shapes(config))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (where / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    # Last, so that a folder with a config is a whole checkpoint.
    (where / "config.json").write_text(json.dumps(dict(config), indent=1))


def write_adapter(config: Mapping[str, Any], where: Path, rank: int, seed: int = 0) -> None:
    """A LoRA of every linear layer as PEFT writes it, random in both halves."""
    generator, made = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes(config):
        if "_proj." in name:
            key = f"base_model.model.{name.removesuffix('.weight')}.lora"
            for half, size in (("A", (rank, shape[1])), ("B", (shape[0], rank))):
                made[f"{key}_{half}.weight"] = torch.empty(size, dtype=torch.bfloat16).normal_(0, SPREAD, generator=generator)
    where.mkdir(parents=True, exist_ok=True)
    save_file(made, where / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "init_lora_weights": True}
    (where / "adapter_config.json").write_text(json.dumps(settings))


if __name__ == "__main__":
    write_checkpoint(model_config(sys.argv[1]), Path(sys.argv[2]))
