"""What a model needs of a GPU's memory is known before it is taken."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from altiplano.engine.config import EngineConfig, LlamaConfig
from altiplano.engine.cuda import loading
from altiplano.engine.cuda.slots import SlotTable
from altiplano.engine.errors import EngineError

LLAMA_1B = LlamaConfig(2048, 8192, 16, 32, 8, 64, 128256, 1e-5, 500000.0, None, True, 131072, (128001,))


def test_a_step_of_the_1b_model_needs_about_what_it_computes() -> None:
    config = EngineConfig(Path("x"), device="cuda", max_num_batched_tokens=16384, max_num_seqs=1024)
    # 16 384 rows of QKV, attention, gate, up and their product, and the residual three times; 1 024 rows of logits.
    assert loading.step_bytes(config, LLAMA_1B) / 2**30 == pytest.approx(1.42, abs=0.1)


def test_deterministic_steps_need_parts_of_attention_and_float32_sums_for_adapters() -> None:
    settings = {"device": "cuda", "max_num_batched_tokens": 8192, "max_model_len": 131072, "num_blocks": 8192}
    plain, without, both = (
        loading.step_bytes(EngineConfig(Path("x"), deterministic=deterministic, max_loras=loras, **settings), LLAMA_1B)
        for deterministic, loras in ((False, 8), (True, 0), (True, 8))
    )
    parts = 132 * (131072 // 256) * 4 * (64 + 2) * 4  # float32 of a head's sums, its largest score and its weight
    assert without - plain == parts and both - without == 8192 * 8192 * 4


@pytest.mark.parametrize("free", [0, 10 << 30])
def test_too_little_memory_is_refused_with_what_would_free_it(free: int) -> None:
    config = EngineConfig(Path("x"), device="cuda", num_blocks=5000, max_num_batched_tokens=8192, max_num_seqs=256)
    loading._check_memory(free, 0, free, config)
    message = f"num_blocks 5000 needs {free / 2**30:.1f} GiB.*8192 and max_num_seqs 256 about 1.0 GiB.*1.0 GiB too little: lower one of them.*fp8"
    with pytest.raises(EngineError, match=message):
        loading._check_memory(free, 1 << 30, free, config)


def test_weights_that_cannot_fit_are_not_even_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loading.weight_bytes(LLAMA_1B) == 2 * 1_235_814_400  # as the model card counts
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 80 << 30))
    config = EngineConfig(Path("model"), device="cuda", num_speculative_tokens=3, speculative_model=Path("nowhere"))
    slots = SlotTable(4, 8, 1024, "cpu")
    for drafts, hint in ((False, "or use a larger one"), (True, "leave speculative_model out, or use a larger one")):
        message = (
            f"the weights of nowhere need 2.3 GiB, 1.3 GiB more than there is, and the GPU has 1.0 GiB free: free it.*{hint}"
        )
        with pytest.raises(EngineError, match=message):
            loading.load_model(config, Path("nowhere"), LLAMA_1B, slots, "auto", "none", 4, drafts=drafts)


def test_a_cache_of_a_draft_that_does_not_fit_names_the_draft() -> None:
    config = EngineConfig(
        Path("x"),
        device="cuda",
        num_blocks=5000,
        num_speculative_tokens=3,
        speculative_model=Path("small"),
        max_num_batched_tokens=8192,
    )
    message = (
        "num_blocks 5000 for the draft of speculative_model small.*beside the model and its cache.*leave speculative_model out"
    )
    with pytest.raises(EngineError, match=message):
        loading._check_memory(2 << 30, 1 << 30, 1 << 30, config, Path("small"))


@pytest.mark.parametrize(("kind", "scales"), [(torch.bfloat16, 0), (torch.float8_e4m3fn, 2), (torch.int8, 2)])
def test_a_cache_is_measured_with_its_scales(kind: torch.dtype, scales: int) -> None:
    config = EngineConfig(Path("x"), device="cuda", num_blocks=1000, block_size=16)
    tokens = 1001 * 16
    assert loading.cache_bytes(config, LLAMA_1B, kind) == 16 * 2 * 8 * tokens * (64 * kind.itemsize + scales)
