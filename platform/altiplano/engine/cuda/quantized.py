"""Weights of fewer bits, made from the bf16 checkpoint when it is loaded (round to nearest).

W8A8 (FP8 or INT8): a scale per output channel, and one per row of the inputs, which are quantized in every step. Embedding and head
stay bf16.

Weight-only: 8 or 4 bits in groups of 128 inputs.
Small batches read the codes; products of more rows unpack one matrix at a time into a scratch buffer that all layers share. The
head of a model of 4 bits has 6, because nothing behind the head evens out its errors (llama.cpp's Q4_K files do the same), and larger
batches use the bf16 embedding that it is tied to.
"""

from dataclasses import dataclass

import torch

from altiplano.engine.weights import Layer, Weights
from altiplano_kernels.few_rows.kernel import unpack
from altiplano_kernels.few_rows.quantized import Packed, pack, quantize
from altiplano_kernels.w8a8.kernel import Codes
from altiplano_kernels.w8a8.reference import quantize_rows

BITS = {"int8": 8, "int4": 4}  # of weights alone
HEAD_BITS = {8: 8, 4: 6}  # of the head, by those of the layers
CODES = {"w8a8-fp8": torch.float8_e4m3fn, "w8a8-int8": torch.int8}


@dataclass(frozen=True)
class PackedLayer:
    """A `Layer` of codes. Each linear weight is unpacked when it is asked for, and valid until the next one is."""

    input_norm: torch.Tensor
    post_norm: torch.Tensor
    packed: dict[str, Packed]
    scratch: torch.Tensor

    @property
    def qkv(self) -> torch.Tensor:
        return unpack(self.packed["qkv"], self.scratch)

    @property
    def o(self) -> torch.Tensor:
        return unpack(self.packed["o"], self.scratch)

    @property
    def gate_up(self) -> torch.Tensor:
        return unpack(self.packed["gate_up"], self.scratch)

    @property
    def down(self) -> torch.Tensor:
        return unpack(self.packed["down"], self.scratch)


AnyLayer = Layer | PackedLayer


@dataclass(frozen=True)
class PackedWeights:
    """`Weights` whose layers are packed."""

    embedding: torch.Tensor
    layers: tuple[PackedLayer, ...]
    norm: torch.Tensor
    head: torch.Tensor
    packed_head: Packed


@dataclass(frozen=True)
class CodedLayer:
    """A `Layer` whose products take rows of codes as well."""

    input_norm: torch.Tensor
    qkv: Codes
    o: Codes
    post_norm: torch.Tensor
    gate_up: Codes
    down: Codes

    @property
    def kind(self) -> torch.dtype:
        return self.qkv.values.dtype


@dataclass(frozen=True)
class CodedWeights:
    """`Weights` whose layers are coded."""

    embedding: torch.Tensor
    layers: tuple[CodedLayer, ...]
    norm: torch.Tensor
    head: torch.Tensor


def code_weights(weights: Weights, kind: torch.dtype) -> CodedWeights:
    """Quantize bf16 `weights` for W8A8 in `kind`: one of `CODES`."""

    def codes(weight: torch.Tensor) -> Codes:
        return Codes(*quantize_rows(weight, kind))

    layers = tuple(
        CodedLayer(one.input_norm, codes(one.qkv), codes(one.o), one.post_norm, codes(one.gate_up), codes(one.down))
        for one in weights.layers
    )
    return CodedWeights(weights.embedding, layers, weights.norm, weights.head)


def pack_weights(weights: Weights, bits: int, head_dim: int, fused_qkv: bool) -> PackedWeights:
    """Quantize bf16 `weights`. `fused_qkv`: whether RoPE and the write of keys and values are part of the QKV product."""
    scratch = torch.empty_like(weights.layers[0].gate_up)
    layers = tuple(_pack_layer(layer, bits, head_dim if fused_qkv else 16, scratch) for layer in weights.layers)
    return PackedWeights(weights.embedding, layers, weights.norm, weights.head, _pack(weights.head, HEAD_BITS[bits]))


def weight_of(layer: AnyLayer, name: str) -> torch.Tensor | Packed:
    """A linear weight of a layer, in the form in which the kernels for few rows take it."""
    if isinstance(layer, PackedLayer):
        return layer.packed[name]
    weight: torch.Tensor = getattr(layer, name)
    return weight


def _pack_layer(layer: Layer, bits: int, head_dim: int, scratch: torch.Tensor) -> PackedLayer:
    packed = {
        "qkv": _pack(layer.qkv, bits, head_dim),
        "o": _pack(layer.o, bits),
        "gate_up": _pack(layer.gate_up, bits, halves=True),
        "down": _pack(layer.down, bits),
    }
    return PackedLayer(layer.input_norm, layer.post_norm, packed, scratch)


def _pack(w: torch.Tensor, bits: int, head_dim: int = 16, halves: bool = False) -> Packed:
    return pack(*quantize(w, bits), bits, head_dim, halves)
