"""The CUDA engine against transformers in float32, and against itself: graphs or single steps, preempted or not."""

import json
import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

from altiplano.engine import Engine, EngineConfig, SamplingParams  # noqa: E402

SHAPES = {
    "1b-like": {
        "hidden_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 1024,
    },
    "3b-like": {
        "hidden_size": 768,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "intermediate_size": 1536,
    },
}
ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 256,
}


@pytest.fixture(scope="module", params=SHAPES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights wide enough for logits that differ."""
    return random_checkpoint(request.param, 0.05, tmp_path_factory)


@pytest.fixture(scope="module", params=SHAPES)
def usual(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the usual initialisation, standard deviation 0.02."""
    return random_checkpoint(request.param, 0.02, tmp_path_factory)


def random_checkpoint(shape: str, spread: float, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_theta": 500000.0, **ROPE},
        initializer_range=spread,
        eos_token_id=4095,
        **SHAPES[shape],
    )
    where = tmp_path_factory.mktemp(shape)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(where)
    assert json.loads((where / "config.json").read_text())["model_type"] == "llama"
    return where


def reference_logits(where: Path, tokens: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(where, dtype=dtype).cuda().eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([tokens], device="cuda")).logits[0].float().cpu()
    return logits


def prompts(count: int, low: int, high: int) -> list[list[int]]:
    dice = random.Random(7)
    return [[dice.randrange(4000) for _ in range(dice.randint(low, high))] for _ in range(count)]


def make(where: Path, kind: str, overlapped: bool = True, quantization: str = "none", **settings: int) -> Engine:
    from altiplano.engine.cuda.overlap import OverlappedEngine
    from altiplano.engine.cuda.runner import CudaRunner

    values = {"max_model_len": 1024, "max_num_seqs": 16, "num_blocks": 600, "max_num_batched_tokens": 512, **settings}
    config = EngineConfig(model=where, device="cuda", dtype="bfloat16", debug=True, **values)
    runner = CudaRunner(config, kv_cache_dtype=kind, quantization=quantization)
    return OverlappedEngine(config, runner) if overlapped else Engine(config, runner)


def greedy_gap(where: Path, prompt: list[int], answer: list[int]) -> float:
    """How far the worst chosen token lies below the best one of the float32 model, in logits."""
    logits = reference_logits(where, prompt + answer)[len(prompt) - 1 : -1]
    return float((logits.max(-1).values - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]).max())


BOUNDS = {"bf16": 3e-2, "int8": 4e-2, "fp8": 0.15}


def own_logprobs(logits: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


@pytest.mark.parametrize("kind", BOUNDS)
def test_teacher_forced_logprobs_equal_transformers_in_float32(usual: Path, kind: str) -> None:
    tokens = prompts(1, 700, 700)[0]
    found = torch.tensor(make(usual, kind).score([tokens])[0])
    worst = float((found - own_logprobs(reference_logits(usual, tokens), tokens)).abs().max())
    print(f"max abs error of logprobs, {kind}: {worst:.4f}")
    assert worst < BOUNDS[kind]


def test_bf16_errs_no_more_than_transformers_in_bf16(checkpoint: Path) -> None:
    tokens = prompts(1, 700, 700)[0]
    wanted = own_logprobs(reference_logits(checkpoint, tokens), tokens)
    ours = float((torch.tensor(make(checkpoint, "bf16").score([tokens])[0]) - wanted).abs().max())
    theirs = float((own_logprobs(reference_logits(checkpoint, tokens, torch.bfloat16), tokens) - wanted).abs().max())
    print(f"max abs error of logprobs against float32: ours {ours:.4f}, transformers in bf16 {theirs:.4f}")
    assert ours < 1.3 * theirs


@pytest.mark.parametrize("kind", BOUNDS)
def test_greedy_answers_are_those_of_the_float32_model(checkpoint: Path, kind: str) -> None:
    asked = prompts(12, 1, 300)
    answers = make(checkpoint, kind).generate(asked, SamplingParams(max_tokens=37, temperature=0.0, ignore_eos=True))
    for prompt, answer in zip(asked, answers, strict=True):
        assert len(answer.token_ids) == 37 and answer.finish_reason == "length"
        assert greedy_gap(checkpoint, prompt, answer.token_ids) < {"bf16": 0.12, "int8": 0.24, "fp8": 0.8}[kind]


@pytest.mark.parametrize("rows", [1, 5, 16, 40])
@pytest.mark.parametrize("kind", BOUNDS)
def test_greedy_answers_of_any_batch_are_those_of_the_float32_model(checkpoint: Path, kind: str, rows: int) -> None:
    asked = prompts(rows, 20, 200)
    engine = make(checkpoint, kind, max_num_seqs=48)
    answers = engine.generate(asked, SamplingParams(max_tokens=21, temperature=0.0, ignore_eos=True))
    for prompt, answer in list(zip(asked, answers, strict=True))[:6]:
        assert greedy_gap(checkpoint, prompt, answer.token_ids) < {"bf16": 0.12, "int8": 0.24, "fp8": 0.8}[kind]


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantized_weights_answer_as_their_own_unpacked_weights(checkpoint: Path, quantization: str) -> None:
    """Small batches read codes, prompts read unpacked weights: both must be the same model."""
    asked = prompts(5, 20, 120)
    engine = make(checkpoint, "bf16", quantization=quantization)
    assert engine.runner.model.weights.packed_head.bits == {"int8": 8, "int4": 6}[quantization]
    answers = engine.generate(asked, SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, seed=1))
    for prompt, answer in zip(asked, answers, strict=True):
        scored = engine.score([prompt + answer.token_ids])[0][len(prompt) - 1 :]
        params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=1)
        best = [engine.generate([prompt + answer.token_ids[:n]], params)[0].logprobs[0] for n in (0, 11, 23)]
        # The head has 8 or 6 bits in small batches: near-equals may swap.
        for n, top in zip((0, 11, 23), best, strict=True):
            assert top - scored[n] < 0.3, (n, top, scored[n])


def test_unknown_quantization_is_refused(checkpoint: Path) -> None:
    from altiplano.engine.errors import EngineError

    with pytest.raises(EngineError, match="use one of none, int8, int4"):
        make(checkpoint, "bf16", quantization="int3")


def test_running_ahead_changes_no_token(checkpoint: Path) -> None:
    asked = prompts(9, 5, 90)
    for params in (
        SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True),
        SamplingParams(max_tokens=30, temperature=0.7, seed=11),
    ):
        ahead = make(checkpoint, "bf16").generate(asked, params)
        stepwise = make(checkpoint, "bf16", overlapped=False).generate(asked, params)
        assert [a.token_ids for a in ahead] == [a.token_ids for a in stepwise]
        assert [a.finish_reason for a in ahead] == [a.finish_reason for a in stepwise]


def test_preemption_under_page_pressure_ends_every_request(checkpoint: Path) -> None:
    asked = prompts(10, 100, 250)
    engine = make(checkpoint, "bf16", num_blocks=40, max_model_len=512)
    answers = engine.generate(asked, SamplingParams(max_tokens=150, temperature=0.0, ignore_eos=True))
    assert engine.stats().preemptions > 0
    for prompt, answer in zip(asked, answers, strict=True):
        assert len(answer.token_ids) == 150
        assert greedy_gap(checkpoint, prompt, answer.token_ids) < 0.12
    assert engine.stats().num_running == 0


def test_a_stop_token_ends_the_answer_and_what_was_drawn_beyond_is_dropped(checkpoint: Path) -> None:
    asked = prompts(1, 40, 40)
    free = make(checkpoint, "bf16").generate(asked, SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True))[0].token_ids
    stop = free[10]
    engine = make(checkpoint, "bf16")
    params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True, stop_token_ids=(stop,))
    answer = engine.generate(asked, params)[0]
    assert answer.finish_reason == "stop" and answer.token_ids == free[: free.index(stop) + 1]
    # Again from the prefix cache that the first answer has left.
    assert engine.generate(asked, params)[0].token_ids == answer.token_ids
    assert engine.stats().cached_tokens >= 32


def test_requests_that_need_whole_rows_share_the_engine(checkpoint: Path) -> None:
    engine = make(checkpoint, "bf16")
    asked = prompts(3, 20, 60)
    kinds = [
        SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=3),
        SamplingParams(max_tokens=12, temperature=0.8, top_p=0.9, top_k=40, seed=5, ignore_eos=True),
        SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True),
    ]
    answers = engine.generate(asked, kinds)
    assert [len(answer.token_ids) for answer in answers] == [12, 12, 40]
    logits = reference_logits(checkpoint, asked[0] + answers[0].token_ids).log_softmax(-1)[len(asked[0]) - 1 : -1]
    wanted = logits.gather(1, torch.tensor(answers[0].token_ids)[:, None])[:, 0]
    assert float((torch.tensor(answers[0].logprobs) - wanted).abs().max()) < 0.1  # wide weights: as transformers in bf16
    assert greedy_gap(checkpoint, asked[2], answers[2].token_ids) < 0.12
