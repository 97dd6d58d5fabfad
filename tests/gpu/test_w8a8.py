"""W8A8 through the whole engine: close to the float32 model, the same in captured and in single steps, and with filters and bursts."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

from altiplano.engine import Engine, EngineConfig, SamplingParams  # noqa: E402
from altiplano.engine.cuda.overlap import OverlappedEngine  # noqa: E402
from altiplano.engine.cuda.runner import CudaRunner  # noqa: E402
from altiplano.models.cria import cria_path  # noqa: E402
from altiplano_kernels.w8a8 import kernel, reference  # noqa: E402

from .captured import captured  # noqa: E402

KINDS = ["w8a8-int8", "w8a8-fp8"]
MODEL = Path(cria_path())


def make(quantization: str, overlapped: bool = True) -> Engine:
    config = EngineConfig(MODEL, device="cuda", dtype="bfloat16", max_model_len=256, num_blocks=512, max_num_seqs=48, debug=True)
    runner = CudaRunner(config, quantization=quantization)
    return OverlappedEngine(config, runner) if overlapped else Engine(config, runner)


@pytest.mark.parametrize("quantization", KINDS)
def test_logprobs_are_close_to_the_float32_model(quantization: str) -> None:
    text = Engine(EngineConfig(MODEL, max_model_len=256)).generate(
        [[0, 60, 70, 80]], SamplingParams(max_tokens=120, seed=1, ignore_eos=True)
    )
    tokens = [0, 60, 70, 80, *text[0].token_ids]
    wanted = torch.tensor(Engine(EngineConfig(MODEL, max_model_len=256)).score([tokens])[0])
    off = (torch.tensor(make(quantization).score([tokens])[0]) - wanted).abs()
    print(f"abs error of logprobs, {quantization}: mean {off.mean():.4f}, max {off.max():.4f}")
    assert float(off.mean()) < {"w8a8-int8": 0.05, "w8a8-fp8": 0.15}[quantization]


@pytest.mark.parametrize("rows", [1, 8, 40])
@pytest.mark.parametrize("quantization", KINDS)
def test_running_ahead_changes_no_token(quantization: str, rows: int) -> None:
    prompts = [[0, 60, 70, 80, 90 + i] for i in range(rows)]
    params = SamplingParams(max_tokens=24, temperature=0.8, top_p=0.9, seed=3, ignore_eos=True)
    ahead = make(quantization).generate(prompts, params)
    stepwise = make(quantization, overlapped=False).generate(prompts, params)
    assert [a.token_ids for a in ahead] == [a.token_ids for a in stepwise]


@pytest.mark.parametrize("rows", [3, 64, 200])
@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
def test_a_captured_layer_whose_kernels_start_early_is_the_same_to_the_bit(kind: torch.dtype, rows: int) -> None:
    """A kernel that reads before the one before has written would show here: each replay has rows of its own."""
    torch.manual_seed(rows)
    hidden, wide = 2048, 8192

    def weight(n: int, k: int) -> kernel.Codes:
        return kernel.Codes(*reference.quantize_rows(torch.randn(n, k, device="cuda") * 0.02, kind))

    o, gate_up, down = weight(hidden, hidden), weight(2 * wide, hidden), weight(hidden, wide)
    mixed, residual = (torch.empty(rows, hidden, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    norm = torch.ones(hidden, dtype=torch.bfloat16, device="cuda")

    def layer(pdl: bool) -> kernel.Codes:
        x = kernel.linear_parts(kernel.quantize_rows(mixed, kind, pdl), o, pdl=pdl)
        between = kernel.linear(kernel.add_norm(x, residual, norm, 1e-5, kind, pdl), gate_up, pdl=pdl)
        x = kernel.linear_parts(kernel.swiglu(between, kind, pdl), down, pdl=pdl)
        return kernel.add_norm(x, residual, norm, 1e-5, kind, pdl)

    mixed.normal_(), residual.normal_()
    graph, result = captured(lambda: layer(True))
    for _ in range(5):
        before, _ = residual.normal_().clone(), mixed.normal_()
        graph.replay()
        found, left = [part.clone() for part in result], residual.clone()
        residual.copy_(before)
        wanted = layer(False)
        assert found[0].view(torch.int8).equal(wanted.values.view(torch.int8)) and found[1].equal(wanted.scales)
        assert left.equal(residual)
