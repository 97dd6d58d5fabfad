"""Adapters in the GPU's pool answer as each of them alone: on a GPU where there is one, else by Triton's interpreter."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from altiplano.engine.adapters import MODULES, Adapter, Pair  # noqa: E402
from altiplano.engine.config import LlamaConfig  # noqa: E402
from altiplano.engine.cuda.adapter_pool import PRODUCTS, AdapterPool, Update  # noqa: E402
from altiplano.engine.errors import AdapterError  # noqa: E402
from altiplano_kernels.lora.reference import add_lora  # noqa: E402
from altiplano_kernels.multi_lora.kernel import PREFILL  # noqa: E402

MODEL = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=100,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    tie_word_embeddings=True,
    max_position_embeddings=128,
    eos_token_ids=(),
)
WIDTHS = {"q_proj": 64, "k_proj": 32, "v_proj": 32, "o_proj": 64, "gate_proj": 128, "up_proj": 128, "down_proj": 64}


def make(name: str, rank: int, modules: tuple[str, ...] = MODULES, dora: bool = False) -> Adapter:
    def pair(module: str) -> Pair:
        inputs = MODEL.intermediate_size if module == "down_proj" else MODEL.hidden_size
        down, up = torch.randn(rank, inputs) * 0.2, torch.randn(WIDTHS[module], rank) * 0.2
        gain = (1 + 0.3 * torch.randn(WIDTHS[module])).bfloat16().to(DEVICE) if dora else None
        return down.bfloat16().to(DEVICE), up.bfloat16().to(DEVICE), gain

    return Adapter(name, rank, tuple({m: pair(m) for m in modules} for _ in range(MODEL.num_hidden_layers)))


def check(update: Update, owners: list[str | None], adapters: dict[str, Adapter]) -> None:
    """Each product of each layer, against the adapters one by one in float64."""
    for layer in range(MODEL.num_hidden_layers):
        for product, modules in PRODUCTS.items():
            x = torch.randn(len(owners), WIDTHS["gate_proj"] if product == "down" else MODEL.hidden_size).bfloat16().to(DEVICE)
            out = torch.randn(len(owners), sum(WIDTHS[m] for m in modules)).bfloat16().to(DEVICE)
            wanted = out.double()
            parts = wanted.split([WIDTHS[m] for m in modules], dim=1)
            for name in {owner for owner in owners if owner is not None}:
                rows = torch.tensor([i for i, owner in enumerate(owners) if owner == name], device=DEVICE)
                for module, part in zip(modules, parts, strict=True):
                    if module in adapters[name].pairs[layer]:
                        down, up, gain = adapters[name].pairs[layer][module]
                        add_lora(part, x.double(), down.double(), up.double(), None if gain is None else gain.double(), rows)
            update(product, layer, x, out)
            error = float((out.double() - wanted).norm() / wanted.norm())
            assert error < 6e-3, (product, layer, error)


def test_decode_rows_and_prompts_use_their_own_adapter() -> None:
    torch.manual_seed(0)
    pool = AdapterPool(MODEL, max_loras=3, max_rank=20, max_batch=16, device=DEVICE)
    adapters = {a.name: a for a in (make("a", 4), make("b", 20, dora=True), make("c", 8, ("q_proj", "v_proj", "down_proj")))}
    for adapter in adapters.values():
        pool.load(adapter)
    decode = pool.decode_update(8)  # as a graph has it: made once, before the rows are known
    for owners in (["a", None, "b", "a", "c"], [None, "c", "c", "b", "b", "b", "a", None], [None]):
        pool.set_rows(owners, 8)
        check(decode, [*owners, *[None] * (8 - len(owners))], adapters)
    prompts = [name for name, tokens in (("b", 70), (None, 3), ("a", 1), ("b", 9)) for _ in range(tokens)]
    tiles = torch.tensor(pool.tiles(prompts, PREFILL), dtype=torch.int32, device=DEVICE)
    check(pool.update(tiles, PREFILL), prompts, adapters)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.int32], ids=["weights", "tiles"])
def test_a_pool_that_nearly_fits_is_refused_like_one_that_does_not(kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = torch.zeros

    def full(*size: int, dtype: torch.dtype, device: str) -> torch.Tensor:
        if dtype == kind:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        return zeros(*size, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(AdapterError, match="lower either of them"):
        AdapterPool(MODEL, max_loras=2, max_rank=16, max_batch=4, device=DEVICE)


def test_nothing_of_an_adapter_is_left_when_its_place_has_a_new_owner() -> None:
    torch.manual_seed(1)
    pool = AdapterPool(MODEL, max_loras=2, max_rank=16, max_batch=4, device=DEVICE)
    kept, first, second = make("kept", 16), make("other", 16, dora=True), make("new", 2, ("k_proj", "up_proj"))
    pool.load(first)
    pool.load(kept)
    pool.unload("other")
    pool.load(second)
    pool.set_rows(["new", "kept", "new"], 4)
    check(pool.decode_update(4), ["new", "kept", "new", None], {"kept": kept, "new": second})
    again = make("kept", 3)  # the same name once more takes the same place
    pool.load(again)
    pool.set_rows(["new", "kept", None, "kept"], 4)
    check(pool.decode_update(4), ["new", "kept", None, "kept"], {"kept": again, "new": second})
