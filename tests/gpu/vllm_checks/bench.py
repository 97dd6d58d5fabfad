"""The engine under test, ours beside it as the reference, and what both are asked."""

import argparse
import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from altiplano.engine import Completion, Engine, EngineConfig, SamplingParams, create_engine
from altiplano.engine.config import read_config
from altiplano.engine.weights import expected_shapes
from altiplano.models.cria import cria_path
from altiplano.serve import messages as m
from altiplano.serve.engine_client import EngineClient
from altiplano.serve.engine_errors import RefusedError
from altiplano.serve.settings import ServeSettings

CONTEXT, CACHE_TOKENS, SEQUENCES = 512, 2048, 16

QUESTIONS = (
    "What is a llama?",
    "Write a short story about a cat and a dog.",
    "What do you get when you add 7 and 5?",
    "Name three colours.",
    "Where does the sun go at night?",
    "Tell me about the sea.",
)


@dataclass
class Answer:
    """What one request was told."""

    tokens: list[int] = field(default_factory=list)
    reason: str | None = None
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    prompt_logprobs: tuple[float, ...] = ()
    prompt_top: tuple[tuple[tuple[int, float], ...], ...] = ()
    cached: int = 0
    moments: list[float] = field(default_factory=list)

    def take(self, news: m.Token) -> None:
        self.moments.append(time.perf_counter())
        self.reason, self.cached = news.finish_reason, max(self.cached, news.num_cached_tokens)
        if news.token_id is not None:
            self.tokens.append(news.token_id)
        if news.logprob is not None:
            self.logprobs.append(news.logprob)
            self.top.append(news.top)
        self.prompt_logprobs = self.prompt_logprobs or news.prompt_logprobs
        self.prompt_top = self.prompt_top or news.prompt_top


class Bench:
    """The engine under test, ours as the reference, and what both are asked."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.model, self.folder, self.tie = cria_path(), folder, float(options.tie)
        self.tokenizer = Tokenizer.from_file(str(self.model / "tokenizer.json"))
        self.config = read_config(self.model)
        self.settings = ServeSettings(
            str(self.model), "cria", engine="vllm", dtype=options.dtype, device="cuda", max_model_len=CONTEXT, max_num_seqs=SEQUENCES,
            max_num_batched_tokens=256, block_size=16, kv_cache_tokens=CACHE_TOKENS,
            kv_cache_dtype=options.kv_cache_dtype, quantization=options.quantization,
        )  # fmt: skip
        self.client = EngineClient(self.settings)
        self.ours: Engine = create_engine(EngineConfig(self.model, max_model_len=CONTEXT, max_lora_rank=16))
        self.prompts = [self.chat(question) for question in QUESTIONS]
        self.adapters = {name: self.make_adapter(name, seed) for name, seed in (("one", 1), ("two", 2))}
        for name, directory in self.adapters.items():
            self.ours.load_adapter(name, directory)
        self.without_sleep = bool(options.without_sleep)
        self._count = 0

    def chat(self, question: str) -> list[int]:
        text = (
            f"<|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        )
        return [0, *self.tokenizer.encode(text, add_special_tokens=False).ids]

    def text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def make_adapter(self, name: str, seed: int, rank: int = 8, hidden: int | None = None) -> Path:
        """A LoRA of random numbers in PEFT's layout, large enough to change what is said."""
        directory = self.folder / name
        directory.mkdir()
        torch.manual_seed(seed)
        tensors = {}
        for key, (rows, columns) in ((k, s) for k, s in dict(expected_shapes(self.config)).items() if len(s) == 2):
            module = key.removesuffix(".weight")
            if not module.rpartition(".")[2].endswith("_proj"):
                continue
            columns = hidden if hidden is not None and columns == self.config.hidden_size else columns
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, columns) / columns**0.5
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, rank) * 0.02
        save_file({key: tensor.to(torch.bfloat16) for key, tensor in tensors.items()}, directory / "adapter_model.safetensors")
        settings = {
            "peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none", "task_type": "CAUSAL_LM",
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        }  # fmt: skip
        (directory / "adapter_config.json").write_text(json.dumps(settings))
        return directory

    def stream(self, prompt: list[int], sampling: m.Sampling, **more: Any) -> AsyncGenerator[m.Token, None]:
        self._count += 1
        return self.client.generate(f"r{self._count}", prompt, sampling, **more)

    async def ask(self, prompt: list[int], sampling: m.Sampling, **more: Any) -> Answer:
        answer = Answer()
        async for news in self.stream(prompt, sampling, **more):
            answer.take(news)
        return answer

    async def greedy(self, prompt: list[int], n: int = 24, **more: Any) -> Answer:
        return await self.ask(prompt, m.Sampling(max_tokens=n, temperature=0.0, ignore_eos=True), **more)

    async def reference(self, prompts: list[list[int]], n: int, adapter: str | None = None) -> list[Completion]:
        params = SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True)
        return await asyncio.to_thread(self.ours.generate, prompts, params, adapter)

    async def scores(self, sequence: list[int], adapter: str | None = None) -> list[float]:
        """Our log-probabilities of tokens 1, 2, … of a sequence."""
        return (await asyncio.to_thread(self.ours.score, [sequence], adapter))[0]

    async def same_choice(self, prompt: list[int], said: Answer, adapter: str | None = None) -> bool:
        """Whether an answer is ours; one that differs must begin to do so at a tie."""
        (wanted,) = await self.reference([prompt], max(1, len(said.tokens)), adapter)
        if said.tokens == wanted.token_ids:
            return True
        pairs = list(zip(said.tokens, wanted.token_ids, strict=False))
        place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        check(place is not None, f"{said.tokens} instead of {wanted.token_ids}")
        assert place is not None
        start = [*prompt, *said.tokens[:place]]
        theirs, best = [(await self.scores([*start, tokens[place]], adapter))[-1] for tokens in (said.tokens, wanted.token_ids)]
        check(
            # bfloat16 rounds more of a random adapter: our own engine in it is 0.2 off.
            best - theirs < (self.tie if adapter is None else 3 * self.tie),
            f"token {place}: {said.tokens[place]} ({theirs:.3f}), ours {wanted.token_ids[place]} ({best:.3f})",
        )
        return False

    async def same_choices(self, said: list[Answer], adapter: str | None = None) -> str:
        same = [await self.same_choice(*pair, adapter) for pair in zip(self.prompts, said, strict=True)]
        return f"{sum(same)} of {len(same)} identical, the others part at a tie"


def check(fine: bool, otherwise: str) -> None:
    if not fine:
        raise AssertionError(otherwise)


async def refused(call: Awaitable[Any], *words: str, kind: type[Exception] = RefusedError) -> str:
    """The message of what must not work."""
    try:
        found = await call
    except kind as error:
        missing = [word for word in words if word not in str(error)]
        check(not missing, f"the error says nothing of {missing}: {error}")
        return str(error)[:160]
    raise AssertionError(f"no error, but {found}")
