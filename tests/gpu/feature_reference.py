"""The float32 model that an engine with quantized weights and an adapter stands for, and how far an answer is from its own."""

import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from altiplano.engine import SamplingParams
from altiplano_kernels.few_rows.quantized import dequantize, quantize
from altiplano_kernels.sampling.reference import gumbel
from altiplano_kernels.w8a8.reference import quantize_rows

from ..engine.feature_requests import Answer, Text

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WEIGHT_BITS = {"int8": 8, "int4": 4}
CODES = {"w8a8-fp8": torch.float8_e4m3fn, "w8a8-int8": torch.int8}
RANK, SCALE = 8, 2.0


def save_adapter(base: torch.nn.Module, where: Path, kind: str, seed: int) -> None:
    """A random adapter ("lora" or "dora") of `base` in PEFT's format, large enough to change most answers."""
    dice = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, module in base.named_modules():
        if name.split(".")[-1] not in MODULES:
            continue
        weight = module.get_parameter("weight").detach().float().cpu()
        down, up = (0.05 * torch.randn(shape, generator=dice) for shape in ((RANK, weight.shape[1]), (weight.shape[0], RANK)))
        key = f"base_model.model.{name}"
        tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
        if kind == "dora":  # as if it had learned something
            norm = (weight + SCALE * up @ down).norm(dim=1)
            tensors[f"{key}.lora_magnitude_vector"] = norm * (1 + 0.3 * torch.randn(len(norm), generator=dice))
    where.mkdir()
    save_file(tensors, where / "adapter_model.safetensors")
    flag = "true" if kind == "dora" else "false"
    (where / "adapter_config.json").write_text(
        f'{{"peft_type": "LORA", "r": {RANK}, "lora_alpha": {SCALE * RANK}, "bias": "none", "use_dora": {flag}}}'
    )


class Product(torch.nn.Module):
    """gain * (W x) + update x, where W is a quantized weight, and x too for the first product where `kind` is given."""

    def __init__(
        self, weight: torch.Tensor, kind: torch.dtype | None, update: torch.Tensor | None, gain: torch.Tensor | None
    ) -> None:
        super().__init__()
        self._weight, self._kind, self._update, self._gain = weight, kind, update, gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: float32 [..., in]; returns [..., out]."""
        y = (x if self._kind is None else _rounded(x, self._kind)) @ self._weight.T
        if self._gain is not None:
            y = y * self._gain
        return y if self._update is None else y + x @ self._update.T


def stand_for(model: torch.nn.Module, quantization: str, adapter: Path | None) -> None:
    """Turn float32 `model` into the one that an engine with `quantization` and `adapter` computes."""
    tensors = (
        {} if adapter is None else load_file(adapter / "adapter_model.safetensors", device=str(next(model.parameters()).device))
    )
    for name, module in list(model.named_modules()):
        parent, _, own = name.rpartition(".")
        if own not in MODULES:
            continue
        weight, key = module.get_parameter("weight").detach(), f"base_model.model.{name}"
        update = gain = None
        if adapter is not None:
            update = SCALE * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
            if (magnitude := tensors.get(f"{key}.lora_magnitude_vector")) is not None:
                gain = magnitude / (weight + update).norm(dim=1)
                update = update * gain[:, None]
        setattr(
            model.get_submodule(parent), own, Product(_quantized(weight, quantization), CODES.get(quantization), update, gain)
        )


def _quantized(weight: torch.Tensor, quantization: str) -> torch.Tensor:
    """float32 [out, in]: what the codes of a weight stand for."""
    if quantization in WEIGHT_BITS:
        return dequantize(*quantize(weight, WEIGHT_BITS[quantization]))
    return weight if quantization == "none" else _rounded(weight, CODES[quantization])


def _rounded(x: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    codes, scales = quantize_rows(x.reshape(-1, x.shape[-1]), kind)
    return (codes.float() * scales[:, None]).view(x.shape)


def distance(raw: torch.Tensor, text: Text, request: int, params: SamplingParams, answer: Answer, bound: float) -> float:
    """How far below the best token the worst of an answer lies, in logits; infinite where a rule or a filter forbids it.

    raw: float32 [tokens of the answer, vocab], the logits that its tokens were drawn from. Filters leave out what they would leave out of
    all logits within `bound` of these.
    """
    worst = 0.0
    for step, token in enumerate(answer.tokens):
        row = text.ruled(raw[step], text.prompts[request], answer.tokens[:step], request, params)
        if params.greedy:
            worst = max(worst, float(row.max() - row[token]))
            continue
        assert params.seed is not None
        scaled = row / params.temperature
        noise = gumbel(torch.tensor([params.seed]), torch.tensor([step]), len(row))[0].to(row.device)
        sure, possible = kept(scaled, params, bound / params.temperature)
        if not possible[token]:
            return math.inf
        total = scaled + noise
        worst = max(worst, params.temperature * float(total[sure].max() - total[token]))
    return worst


def kept(scaled: torch.Tensor, params: SamplingParams, slack: float) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [vocab] each: tokens that top-k, top-p and min-p keep for any, and for some, logits of which no two have moved by more than
    `slack` against each other. scaled: float32 [vocab], after temperature."""
    sure, possible = torch.ones_like(scaled, dtype=torch.bool), torch.ones_like(scaled, dtype=torch.bool)
    top = scaled.max()
    if params.top_k:
        edge = scaled.topk(params.top_k).values[-1]
        sure &= scaled > edge + slack
        possible &= scaled >= edge - slack
    if params.top_p < 1:
        left = possible.nonzero()[:, 0]
        likely = scaled[left].softmax(-1)
        ahead = scaled[left][None, :] - scaled[left][:, None]  # of the token in the column before that in the row
        most = (likely * (ahead > -slack).float().fill_diagonal_(0)).sum(1) * math.exp(slack)
        least = (likely * (ahead > slack)).sum(1) * math.exp(-slack)
        sure[left] &= most < params.top_p
        possible[left] &= least < params.top_p
    if params.min_p > 0:
        edge = top + math.log(params.min_p)
        sure &= scaled > edge + slack
        possible &= scaled >= edge - slack
    return sure | (scaled == top), possible
