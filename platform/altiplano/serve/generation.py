"""From a checked request to streams of text: prompts, sampling, stop strings, usage."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import msgspec
from jinja2 import TemplateError
from tokenizers import Tokenizer

from altiplano.data.templates import ChatTemplate
from altiplano.serve import messages as m
from altiplano.serve.adapters import BASE, Adapter, Adapters
from altiplano.serve.call import current_call
from altiplano.serve.changes import Changes
from altiplano.serve.conversation import GUARD, Message
from altiplano.serve.detokenize import TextStream, Vocabulary
from altiplano.serve.engine_client import EngineClient
from altiplano.serve.errors import ApiError
from altiplano.serve.experiment import Experiment, check_user_config
from altiplano.serve.protocol import ChatRequest, CompletionRequest
from altiplano.serve.settings import ServeSettings
from altiplano.serve.sleeping import Sleeping
from altiplano.serve.tools import Function
from altiplano.serve.usage import Usage

LONG_TEXT = 8192  # characters; longer ones are divided into tokens beside the event loop


@dataclass
class Piece:
    """New text of one answer, with the tokens behind it (none when an end token is hidden); `news` is what the engine said."""

    index: int
    text: str
    tokens: list[m.Token]
    finish_reason: str | None
    news: m.Token


@dataclass
class Generator:
    """Everything that answers need; `aliases` may be replaced while requests run."""

    settings: ServeSettings
    client: EngineClient
    tokenizer: Tokenizer
    template: ChatTemplate
    aliases: dict[str, str] = field(default_factory=dict)
    experiment: Experiment = field(default_factory=Experiment)

    def __post_init__(self) -> None:
        self.vocabulary = Vocabulary(self.tokenizer)
        self.adapters = Adapters(self.client)
        self.changes = Changes(self.experiment.name)
        self.sleeping = Sleeping(self.experiment.name, self.client)
        self._changing = asyncio.Lock()

    def model_names(self) -> list[str]:
        return [self.settings.served_model_name, *self.adapters.names, *sorted(self.aliases)]

    def adapter_of(self, model: str) -> Adapter | None:
        """The adapter behind a model name; None for the base.

        Raises:
            ApiError: 404, no such model.
        """
        name = self.aliases.get(model, model)
        if name == self.settings.served_model_name:
            return None
        adapter = self.adapters.get(name)
        if adapter is None:
            raise ApiError(
                404,
                f"there is no model {model!r}: use one of {', '.join(self.model_names())}",
                param="model",
                code="model_not_found",
            )
        return adapter

    def weights_of(self, model: str) -> str:
        """What tells the weights behind a model name from all others.

        Raises:
            ApiError: 404, no such model.
        """
        adapter = self.adapter_of(model)
        return BASE if adapter is None else adapter.id

    def chat_text(self, messages: list[Message], functions: list[Function], *, add_generation_prompt: bool = True) -> str:
        """A chat as the model reads it.

        Raises:
            ApiError: 400, messages that the format cannot express.
        """
        tools = [{"type": "function", "function": f.model_dump(exclude_none=True)} for f in functions]
        try:
            turns = [turn for message in messages for turn in message.turns()]
            return self.template.render(turns, add_generation_prompt=add_generation_prompt, tools=tools or None)
        except (ValueError, TemplateError) as error:
            raise ApiError(400, f"the messages do not fit the chat format: {error}", param="messages") from error

    async def chat_prompt(self, request: ChatRequest) -> list[int]:
        """Token ids of a chat, ready for the assistant to speak."""
        return await self.encode(self.chat_text(request.messages, request.callable), "messages")

    async def completion_prompts(self, request: CompletionRequest) -> list[list[int]]:
        """Token ids of every prompt of a completion request; text begins with the model's begin token."""
        prompts = request.prompts()
        if not prompts or any(not prompt for prompt in prompts):
            raise ApiError(400, "the prompt is empty: give at least one character or token", param="prompt")
        found = []
        for prompt in prompts:
            if isinstance(prompt, str):
                found.append([self.begin_token_id, *await self.encode(prompt, "prompt")])
            else:
                self.check_ids(prompt, "prompt")
                found.append(prompt)
        return found

    @property
    def begin_token_id(self) -> int:
        return int(self.tokenizer.token_to_id(self.template.bos_token))  # type: ignore[arg-type]  # every Llama has it

    async def encode(self, text: str, param: str) -> list[int]:
        """Token ids of a text, special tokens by their names unless a guard divides the name.

        Raises:
            ApiError: 400, the text cannot fit into the context, however it is divided into tokens.
        """
        if len(text) > self.settings.max_model_len * self.vocabulary.longest:
            raise ApiError(
                400,
                f"{len(text)} characters are more than a context of {self.settings.max_model_len} tokens can hold: shorten {param}",
                param=param,
                code="context_length_exceeded",
            )
        return self._ids(text) if len(text) < LONG_TEXT else await asyncio.to_thread(self._ids, text)

    async def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens by their names."""
        return await asyncio.to_thread(self.tokenizer.decode, ids, skip_special_tokens=False)

    def _ids(self, text: str) -> list[int]:
        parts = text.split(GUARD)
        return [token_id for part in parts for token_id in self.tokenizer.encode(part, add_special_tokens=False).ids]

    def check_ids(self, ids: Iterable[int], param: str) -> None:
        """
        Raises:
            ApiError: 400, ids that the model does not have.
        """
        bad = [token_id for token_id in ids if not 0 <= token_id < self.client.vocab_size]
        if bad:
            raise ApiError(400, f"{param} names token ids {bad[:5]} outside 0 … {self.client.vocab_size - 1}", param=param)

    def sampling(self, request: ChatRequest | CompletionRequest, prompt_tokens: int) -> m.Sampling:
        """The engine's parameters; without max_tokens, a chat may fill the context.

        Raises:
            ApiError: 400, no room for that many tokens, or tokens that the model does not have.
        """
        self.check_ids(request.logit_bias or (), "logit_bias")
        self.check_ids(request.stop_token_ids, "stop_token_ids")
        room = self.settings.max_model_len - prompt_tokens
        wanted = request.max_tokens
        logprobs: int | None
        if isinstance(request, ChatRequest):
            wanted = request.max_completion_tokens or request.max_tokens or max(1, room)
            logprobs = (request.top_logprobs or 0) if request.logprobs else None
        else:
            logprobs = request.logprobs
        assert wanted is not None
        if wanted > room:
            raise ApiError(
                400,
                f"the context holds {self.settings.max_model_len} tokens, and the request asks for {prompt_tokens + wanted} "
                f"({prompt_tokens} in the prompt, {wanted} to generate): shorten one of them",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return m.Sampling(
            max_tokens=wanted,
            min_tokens=min(request.min_tokens, wanted),
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            min_p=request.min_p,
            seed=request.seed,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            repetition_penalty=request.repetition_penalty,
            logit_bias=request.logit_bias,
            stop_token_ids=tuple(request.stop_token_ids),
            ignore_eos=request.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=isinstance(request, CompletionRequest) and request.echo and logprobs is not None,
        )

    async def stream(
        self, request: ChatRequest | CompletionRequest, prompts: list[list[int]], usage: Usage
    ) -> AsyncIterator[Piece]:
        """Pieces of all answers, as they come. Answer i belongs to prompt i // n."""
        adapter = self.adapter_of(self.experiment.arm_for(request.model))
        call = current_call()
        if call is not None:
            call.weights = BASE if adapter is None else adapter.id
        usage.prompt_tokens = sum(len(prompt) for prompt in prompts)
        plans = [(prompt, self.sampling(request, len(prompt)), copy) for prompt in prompts for copy in range(request.n)]
        answers = [
            self._answer(index, prompt, _copy(sampling, copy), adapter, request, usage)
            for index, (prompt, sampling, copy) in enumerate(plans)
        ]
        mirror = self.experiment.mirror(self, request)
        self.adapters.hold(adapter)
        try:
            # One answer is passed on as it comes: a queue and a task between would cost as much as everything else here.
            async with aclosing(answers[0] if len(answers) == 1 else _merged(answers)) as pieces:
                async for piece in pieces:
                    if mirror is not None:
                        mirror.saw(piece)
                    yield piece
            if mirror is not None:
                mirror.begin(prompts[0])
        finally:
            await self.adapters.release(adapter)

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Take adapters, aliases and the test of a user_config. Requests that run are not touched.

        Raises:
            ValueError: what to change, an adapter that is damaged or does not fit among it; nothing has changed then.
            EngineDiedError, TimeoutError: the engine did not answer; nothing has changed either.
        """
        adapters, aliases = (_names(user_config, key, self.settings.served_model_name) for key in ("adapters", "aliases"))
        check_user_config(user_config)
        async with self._changing:
            loaded = await self.adapters.load(adapters)
            # Names and weights change in one step: no request meets an arm without its adapter.
            self.aliases = aliases
            self.experiment.configure(user_config)
            await self.adapters.use(loaded)

    async def _answer(
        self,
        index: int,
        prompt: list[int],
        sampling: m.Sampling,
        adapter: Adapter | None,
        request: ChatRequest | CompletionRequest,
        usage: Usage,
    ) -> AsyncGenerator[Piece, None]:
        text = TextStream(self.vocabulary, request.stops)
        name = f"req-{uuid.uuid4().hex}"
        weights = None if adapter is None else adapter.id
        # Copies of one prompt find each other's pages: what counts is what the first one found.
        uncounted = index % request.n == 0
        async with aclosing(self.client.generate(name, prompt, sampling, adapter=weights, grammar=request.grammar)) as tokens:
            async for token in tokens:
                usage.cached_tokens += token.num_cached_tokens if uncounted else 0
                uncounted = False
                usage.completion_tokens += token.token_id is not None
                ends = token.finish_reason == "stop"
                fresh = text.push(token.token_id) if token.token_id is not None and not ends else ""
                reason = "stop" if text.stopped else token.finish_reason
                fresh += text.finish() if reason is not None else ""
                if text.stopped and (call := current_call()) is not None:
                    call.stopped.add(name)
                yield Piece(index, fresh, [] if ends else [token], reason, token)
                if reason is not None:
                    return


async def _merged(answers: list[AsyncGenerator[Piece, None]]) -> AsyncGenerator[Piece, None]:
    """Pieces of several answers, as they come; the first failure ends all."""
    pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()

    async def collect(answer: AsyncGenerator[Piece, None]) -> None:
        try:
            async with aclosing(answer):
                async for piece in answer:
                    pieces.put_nowait(piece)
        except Exception as error:
            pieces.put_nowait(error)

    tasks = [asyncio.create_task(collect(answer)) for answer in answers]
    running = len(tasks)
    try:
        while running:
            piece = await pieces.get()
            if isinstance(piece, Exception):
                raise piece
            running -= piece.finish_reason is not None
            yield piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _names(user_config: Mapping[str, Any], key: str, served_model_name: str) -> dict[str, str]:
    """
    Raises:
        ValueError: what to change.
    """
    found = user_config.get(key, {})
    if not isinstance(found, Mapping) or not all(isinstance(text, str) for pair in found.items() for text in pair):
        raise ValueError(f"{key} of the user_config has to map names to texts")
    for name in (BASE, served_model_name):
        if name in found:
            raise ValueError(f"{key} names {name!r}, which is the base model: choose another name")
    return dict(found)


def _copy(sampling: m.Sampling, copy: int) -> m.Sampling:
    """The n-th answer to one prompt draws from its own seed."""
    return (
        sampling if copy == 0 or sampling.seed is None else msgspec.structs.replace(sampling, seed=(sampling.seed + copy) % 2**63)
    )
