"""vLLM's RequestOutputs as our TokenOutputs."""

from dataclasses import replace
from typing import Any

from altiplano.engine.outputs import TokenOutput


def token_outputs(output: Any, max_tokens: int, top: int, first: bool) -> list[TokenOutput]:
    """A RequestOutput of kind DELTA, one output for each token; the last has the reason when it was the request's last.

    `max_tokens`, `top`: how many tokens, and how many likely ones beside each, the request asked for. `first`: nothing of it has been
    told before, so what belongs to its prompt goes with the first output.
    """
    (completion,) = output.outputs
    reason, tokens = completion.finish_reason, list(completion.token_ids)
    # Without news vLLM repeats all that it has told before.
    logprobs = completion.logprobs if tokens and completion.logprobs else [None] * len(tokens)
    if max_tokens == 0:  # scoring: the draw was not asked for
        tokens, logprobs, reason = [], [], "length" if reason == "stop" else reason
    news = [
        TokenOutput(output.request_id, token, *_chosen(token, found, top)) for token, found in zip(tokens, logprobs, strict=True)
    ]
    if not news and reason is not None:
        news = [TokenOutput(output.request_id, None)]
    if not news:
        return []
    if first:
        cached = output.num_cached_tokens or 0
        news[0] = replace(news[0], num_cached_tokens=cached, queue_seconds=_queued(output), **_of_prompt(output, top))
    news[-1] = replace(news[-1], finish_reason=reason)
    return news


def _chosen(token: int, found: Any, top: int) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    """(log-probability of the token, the `top` most likely ones); vLLM lists the token beside them, wherever it ranks."""
    return (None, ()) if found is None else (found[token].logprob, _ranked(found, top))


def _ranked(found: Any, top: int) -> tuple[tuple[int, float], ...]:
    ordered = sorted(found.items(), key=lambda item: item[1].rank)
    return tuple((token, entry.logprob) for token, entry in ordered[:top])


def _of_prompt(output: Any, top: int) -> dict[str, Any]:
    """Of prompt tokens 1, 2, …; vLLM's list begins with None for token 0."""
    if not output.prompt_logprobs:
        return {}
    rows = list(zip(output.prompt_token_ids, output.prompt_logprobs, strict=True))[1:]
    found: dict[str, Any] = {"prompt_logprobs": tuple(row[token].logprob for token, row in rows)}
    return found | ({"prompt_top": tuple(_ranked(row, top) for _, row in rows)} if top else {})


def _queued(output: Any) -> float | None:
    """Seconds from arrival to the first step, where vLLM keeps count."""
    return None if output.metrics is None else output.metrics.scheduled_ts - output.metrics.queued_ts
