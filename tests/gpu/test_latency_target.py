"""A target for the time between tokens limits the prompts that share steps with decodes."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

from altiplano.engine import EngineConfig, SamplingParams  # noqa: E402
from altiplano.engine.cuda.overlap import OverlappedEngine  # noqa: E402
from altiplano.engine.cuda.runner import CudaRunner  # noqa: E402

from .test_runner import prompts, random_checkpoint  # noqa: E402


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint("1b-like", 0.05, tmp_path_factory)


def test_prompts_come_in_smaller_pieces_under_a_target_and_all_end(checkpoint: Path) -> None:
    largest: dict[float | None, int] = {}
    answers = []
    for target in (None, 1.5):
        config = EngineConfig(
            checkpoint, device="cuda", dtype="bfloat16", max_model_len=4096, max_num_seqs=32, num_blocks=4000,
            max_num_batched_tokens=8192, itl_target_ms=target, enable_prefix_caching=False, debug=True,
        )  # fmt: skip
        engine = OverlappedEngine(config, CudaRunner(config))
        talk = SamplingParams(max_tokens=900, temperature=0.0, ignore_eos=True)
        engine.add_request("talker", [1, 2, 3], talk)
        found: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts(8, 2000, 3000)):
            engine.add_request(str(i), prompt, SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True))
            for _ in range(12):
                for output in engine.step():
                    found.setdefault(output.request_id, []).append(output.token_id or 0)
        while engine.has_unfinished():
            for output in engine.step():
                found.setdefault(output.request_id, []).append(output.token_id or 0)
        assert {name: len(tokens) for name, tokens in found.items()} == {"talker": 900, **{str(i): 5 for i in range(8)}}
        largest[target] = max(record.prompt_tokens for record in engine.step_log.last() if record.decodes)
        answers.append(found["talker"][:20])
    assert largest[1.5] < largest[None], largest
    assert answers[0] == answers[1]
