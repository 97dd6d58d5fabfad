"""Checkpoints in Hugging Face's safetensors layout to the tensors that the runners use. Pickles are never opened."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from altiplano.engine.config import LlamaConfig
from altiplano.engine.errors import WeightsError

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


@dataclass(frozen=True)
class Layer:
    """One block. Linear weights are [out, in]; qkv and gate_up are stacked, so that one product serves them."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    o: torch.Tensor
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True)
class Weights:
    """A whole Llama. `head` is `embedding` itself where they are tied."""

    embedding: torch.Tensor
    layers: tuple[Layer, ...]
    norm: torch.Tensor
    head: torch.Tensor


def load_weights(directory: Path, config: LlamaConfig, dtype: torch.dtype, device: str) -> Weights:
    """Read every tensor once, in `dtype`, onto `device`.

    Raises:
        WeightsError: no safetensors file, or a tensor that is missing or has another shape than config.json says.
    """
    found: dict[str, torch.Tensor] = {}
    for path in _files(directory):
        try:
            with safe_open(path, framework="pt", device=device) as reader:
                for name in reader.keys():  # noqa: SIM118 (not a dict)
                    found[name] = reader.get_tensor(name).to(dtype)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path} cannot be read as safetensors ({error}): copy the model again") from error
    return _assemble(config, found, directory)


def read_tensor(directory: Path, name: str, device: str) -> torch.Tensor:
    """One tensor of a checkpoint, as stored.

    Raises:
        WeightsError: no file has it.
    """
    for path in _files(directory):
        with safe_open(path, framework="pt", device=device) as reader:
            if name in reader.keys():  # noqa: SIM118 (not a dict)
                found: torch.Tensor = reader.get_tensor(name)
                return found
    raise WeightsError(f"{directory} has no tensor {name}: copy the model again")


def random_weights(config: LlamaConfig, dtype: torch.dtype, device: str, seed: int) -> Weights:
    """Normal weights of standard deviation 0.02 by config: for benchmarks, where only shapes matter."""
    generator = torch.Generator(device=device).manual_seed(seed)
    made = {}
    for name, shape in expected_shapes(config):
        if name.endswith("norm.weight"):
            made[name] = torch.ones(shape, dtype=dtype, device=device)
        else:
            made[name] = torch.empty(shape, dtype=dtype, device=device).normal_(0, 0.02, generator=generator)
    return _assemble(config, made, Path("random weights"))


def expected_shapes(config: LlamaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor of a checkpoint."""
    hidden, wide = config.hidden_size, config.intermediate_size
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    yield "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        yield prefix + "self_attn.q_proj.weight", (query, hidden)
        yield prefix + "self_attn.k_proj.weight", (key, hidden)
        yield prefix + "self_attn.v_proj.weight", (key, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, query)
        yield prefix + "mlp.gate_proj.weight", (wide, hidden)
        yield prefix + "mlp.up_proj.weight", (wide, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, wide)


def _files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [name for name in names if not (directory / name).exists()]
        if missing:
            raise WeightsError(f"{directory} lacks {', '.join(missing)}, which its index names: copy the model again")
        return [directory / name for name in names]
    files = sorted(directory.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    hint = (
        f" ({', '.join(pickles)} are pickles, which can run code and are never opened: convert them to safetensors)"
        if pickles
        else ""
    )
    raise WeightsError(f"{directory} has no .safetensors file{hint}")


def _assemble(config: LlamaConfig, found: dict[str, torch.Tensor], directory: Path) -> Weights:
    for name, shape in expected_shapes(config):
        if name not in found:
            raise WeightsError(f"{directory} has no tensor {name}: the checkpoint is incomplete; copy the model again")
        if tuple(found[name].shape) != shape:
            raise WeightsError(
                f"{directory}: {name} is {tuple(found[name].shape)}, and config.json asks for {shape}: they belong to different models"
            )
    layers = tuple(_layer(found, f"model.layers.{index}.") for index in range(config.num_hidden_layers))
    embedding = found["model.embed_tokens.weight"]
    head = embedding if config.tie_word_embeddings else found["lm_head.weight"]
    return Weights(embedding, layers, found["model.norm.weight"], head)


def _layer(found: dict[str, torch.Tensor], prefix: str) -> Layer:
    """One block; its parts leave `found`, so that stacked copies do not double the memory."""

    def take(name: str) -> torch.Tensor:
        return found.pop(f"{prefix}{name}.weight")

    return Layer(
        input_norm=take("input_layernorm"),
        qkv=torch.cat([take(f"self_attn.{part}_proj") for part in "qkv"]),
        o=take("self_attn.o_proj"),
        post_norm=take("post_attention_layernorm"),
        gate_up=torch.cat([take("mlp.gate_proj"), take("mlp.up_proj")]),
        down=take("mlp.down_proj"),
    )
