"""Adapters on the GPU: in the same captured steps as everybody else, each request with its own."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

from altiplano.engine import Engine, EngineConfig, SamplingParams  # noqa: E402
from altiplano_kernels.multi_lora.kernel import DECODE, add_adapters, list_tiles, most_tiles  # noqa: E402

from .captured import captured  # noqa: E402

KINDS = ("lora", "rslora", "dora")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A base and an adapter of each kind, with ranks that differ, large enough to change most tokens."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    root, found = tmp_path_factory.mktemp("adapters"), {}
    settings = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
        initializer_range=0.05,
        eos_token_id=4095,
    )
    for kind, rank in zip(KINDS, (4, 16, 24), strict=True):
        torch.manual_seed(0)
        base = LlamaForCausalLM(settings).to(torch.bfloat16)
        base.save_pretrained(root / "base")
        torch.manual_seed(rank)
        lora = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=["q_proj", "v_proj", "down_proj"] if kind == "rslora" else "all-linear",
            use_rslora=kind == "rslora",
            use_dora=kind == "dora",
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        found[kind] = root / kind
        get_peft_model(base, lora).save_pretrained(found[kind])
    return root / "base", found


def make(
    adapters: tuple[Path, dict[str, Path]], overlapped: bool = True, quantization: str = "none", max_num_seqs: int = 32
) -> Engine:
    from altiplano.engine.cuda.overlap import OverlappedEngine
    from altiplano.engine.cuda.runner import CudaRunner

    base, kinds = adapters
    config = EngineConfig(
        model=base, device="cuda", dtype="bfloat16", debug=True, max_model_len=512, max_num_seqs=max_num_seqs, num_blocks=600
    )
    runner = CudaRunner(config, quantization=quantization)
    engine = OverlappedEngine(config, runner) if overlapped else Engine(config, runner)
    for name, directory in kinds.items():
        engine.load_adapter(name, directory)
    return engine


def answers(engine: Engine, asked: list[tuple[list[int], str | None, SamplingParams]]) -> list[list[int]]:
    """All requests at once."""
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(asked))}
    for i, (prompt, adapter, params) in enumerate(asked):
        engine.add_request(str(i), prompt, params, adapter=adapter)
    while engine.has_unfinished():
        for news in engine.step():
            if news.token_id is not None:
                tokens[news.request_id].append(news.token_id)
    return [tokens[str(i)] for i in range(len(asked))]


def requests(count: int) -> list[tuple[list[int], str | None, SamplingParams]]:
    """Every adapter and none, greedy, tempered and filtered."""
    names: list[str | None] = [None, *KINDS]
    kinds = (
        SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True),
        SamplingParams(max_tokens=20, temperature=0.8, seed=3, ignore_eos=True),
        SamplingParams(max_tokens=20, temperature=0.8, top_p=0.9, top_k=50, seed=4, ignore_eos=True),
    )
    return [([7 * i + j for j in range(5 + 11 * i % 40)], names[i % 4], kinds[i % 3]) for i in range(count)]


def test_the_logprobs_of_each_adapter_are_pefts(adapters: tuple[Path, dict[str, Path]]) -> None:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    base, kinds = adapters
    engine = make(adapters)
    tokens = [(37 * i) % 4000 for i in range(200)]
    for name in (None, *kinds):
        model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
        tuned = model if name is None else PeftModel.from_pretrained(model, kinds[name])
        with torch.inference_mode():
            logprobs = tuned.cuda().eval()(torch.tensor([tokens], device="cuda")).logits[0].log_softmax(-1).cpu()
        wanted = logprobs[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        worst = float((torch.tensor(engine.score([tokens], adapter=name)[0]) - wanted).abs().max())
        print(f"max abs error of logprobs, {name}: {worst:.4f}")
        assert worst < 0.15  # wide weights in bf16


@pytest.mark.parametrize("rows", [1, 4, 24])
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_running_ahead_with_adapters_changes_no_token(
    adapters: tuple[Path, dict[str, Path]], rows: int, quantization: str
) -> None:
    asked = requests(rows) if rows > 1 else requests(4)[2:3]
    ahead = answers(make(adapters, quantization=quantization), asked)
    assert ahead == answers(make(adapters, overlapped=False, quantization=quantization), asked)
    assert all(len(tokens) == 20 for tokens in ahead)


def test_requests_with_adapters_stay_in_captured_steps(adapters: tuple[Path, dict[str, Path]]) -> None:
    """Bursts bring several tokens of a request in one step; the fallback brings one."""
    engine = make(adapters)
    engine.add_request("a", [1, 2, 3], SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True), adapter="dora")
    most = 0
    while engine.has_unfinished():
        most = max(most, sum(1 for news in engine.step() if news.token_id is not None))
    assert most > 1


def test_a_new_adapter_in_the_place_of_an_old_one(adapters: tuple[Path, dict[str, Path]]) -> None:
    engine, asked = make(adapters), [([5, 6, 7, 8], "lora", SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True))]
    first = answers(engine, asked)
    engine.unload_adapter("lora")
    engine.load_adapter("lora", adapters[1]["rslora"])
    swapped = answers(engine, asked)
    assert swapped == answers(engine, [(asked[0][0], "rslora", asked[0][2])]) != first


@pytest.mark.parametrize("rows", [1, 8, 100])
def test_captured_updates_that_start_early_follow_the_list_and_the_rows(rows: int) -> None:
    """Eight adapters at the sizes of gate and up: a new list of tiles and new rows in each replay of one graph."""
    torch.manual_seed(rows)
    adapters, rank, k, bounds = 8, 64, 2048, (8192, 16384)
    ranks = [8, 64, 16, 3, 8, 33, 64, 1]
    down, up = (
        torch.randn(adapters, 2 * rank, k, device="cuda").bfloat16() * 0.02,
        torch.randn(adapters, 16384, rank, device="cuda").bfloat16(),
    )
    gain = torch.rand(adapters, 16384, device="cuda").bfloat16()
    given, x = (torch.randn(rows, width, device="cuda").bfloat16() for width in (16384, k))
    count = most_tiles(rows, adapters, DECODE)
    tiles = torch.tensor(list_tiles([0] * rows, ranks, DECODE, count), dtype=torch.int32, device="cuda")

    def step(pdl: bool) -> torch.Tensor:
        out = given.clone()
        add_adapters(out, x, down, up, gain, bounds, tiles, DECODE, pdl)
        add_adapters(out, x, down, up, gain, bounds, tiles, DECODE, pdl)
        return out

    graph, result = captured(lambda: step(True))
    for replay in range(5):
        owners = [(3 * row + replay) % (adapters + 1) for row in range(rows)]
        tiles.copy_(torch.tensor(list_tiles(owners, ranks, DECODE, count), dtype=torch.int32))
        x.normal_()
        graph.replay()
        found = result.clone()
        assert found.equal(step(False))
        untouched = torch.tensor(owners, device="cuda") == 0
        assert found[untouched].equal(given[untouched])
