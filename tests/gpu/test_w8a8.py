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
