"""One answer as OpenAI's `choices` have it: pieces of text in, pieces of a choice out, and the pieces put together."""

from typing import Any

from altiplano.serve.generation import Generator, Piece
from altiplano.serve.logprobs import CompletionLogprobs, chat_logprobs, joined
from altiplano.serve.protocol import ChatRequest, CompletionRequest
from altiplano.serve.tools import CallReader, Delta


class ChatChoice:
    """An answer of a chat, with its calls told from its content."""

    def __init__(self, generator: Generator, request: ChatRequest, index: int) -> None:
        self._vocabulary, self._index = generator.vocabulary, index
        names = {function.name for function in request.callable}
        self._calls = CallReader(names) if names else None
        self._with_logprobs = bool(request.logprobs)

    def opening(self) -> dict[str, Any]:
        """The first chunk, which says who speaks."""
        return self._chunk({"role": "assistant", "content": ""}, None, None)

    def chunk(self, piece: Piece) -> dict[str, Any] | None:
        """The piece in the shape of a stream; None when it shows nothing."""
        delta = self._settled(piece)
        said: dict[str, Any] = {"content": delta.content} if delta.content else {}
        said |= {"tool_calls": delta.calls} if delta.calls else {}
        logprobs = chat_logprobs(self._vocabulary, piece.tokens) if self._with_logprobs else None
        if not (said or piece.finish_reason or (logprobs and logprobs["content"])):
            return None
        reason = piece.finish_reason
        if reason == "stop" and self._calls is not None and self._calls.count:
            reason = "tool_calls"
        return self._chunk(said, logprobs, reason)

    def whole(self, chunks: list[dict[str, Any]]) -> dict[str, Any]:
        """The chunks of an answer as one choice."""
        content = "".join(chunk["delta"].get("content", "") for chunk in chunks)
        calls: list[dict[str, Any]] = []
        for call in (call for chunk in chunks for call in chunk["delta"].get("tool_calls", ())):
            if call["index"] == len(calls):
                calls.append({name: value for name, value in call.items() if name != "index"})
            else:
                calls[-1]["function"]["arguments"] += call["function"]["arguments"]
        message: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None, "refusal": None}
        message |= {"tool_calls": calls} if calls else {}
        return {
            "index": self._index,
            "message": message,
            "logprobs": joined([chunk["logprobs"] for chunk in chunks]) if self._with_logprobs else None,
            "finish_reason": chunks[-1]["finish_reason"],
        }

    def _settled(self, piece: Piece) -> Delta:
        if self._calls is None:
            return Delta(piece.text)
        delta = self._calls.push(piece.text)
        if piece.finish_reason is not None:
            last = self._calls.finish()
            delta = Delta(delta.content + last.content, delta.calls + last.calls)
        return delta

    def _chunk(self, delta: dict[str, Any], logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


class CompletionChoice:
    """An answer of a completion, with its prompt in front when that is asked for."""

    def __init__(self, generator: Generator, request: CompletionRequest, index: int, prompt: list[int]) -> None:
        self._vocabulary, self._index, self._prompt = generator.vocabulary, index, prompt
        self._echo = request.echo
        self._logprobs = CompletionLogprobs(generator.vocabulary) if request.logprobs is not None else None

    def opening(self) -> None:
        """Nothing comes before the first piece."""

    def chunk(self, piece: Piece) -> dict[str, Any] | None:
        """The piece in the shape of a stream; None when it shows nothing."""
        text, parts = piece.text, []
        if self._logprobs is not None and self._echo:
            parts.append(self._logprobs.prompt(self._prompt, piece.news))
        if self._logprobs is not None:
            parts.append(self._logprobs.answer(piece.tokens))
        if self._echo:
            text, self._echo = self._vocabulary.text(self._prompt) + text, False
        logprobs = joined(parts) if parts else None
        if not (text or piece.finish_reason or (logprobs and logprobs["tokens"])):
            return None
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    def whole(self, chunks: list[dict[str, Any]]) -> dict[str, Any]:
        """The chunks of an answer as one choice."""
        return {
            "index": self._index,
            "text": "".join(chunk["text"] for chunk in chunks),
            "logprobs": joined([chunk["logprobs"] for chunk in chunks]) if self._logprobs is not None else None,
            "finish_reason": chunks[-1]["finish_reason"],
        }
