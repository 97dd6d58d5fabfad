"""What an engine gives back: news of requests, whole answers, and its counters."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenOutput:
    """News of one request: at most one token, and the reason when it was the last. One a step, or several where guesses were right."""

    request_id: str
    token_id: int | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: str | None = None  # stop, length or abort; error where vLLM gives up
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[float, ...] = ()  # of prompt tokens 1, 2, …; with the first output, when they were asked for
    prompt_top: tuple[tuple[tuple[int, float], ...], ...] = ()  # the most likely tokens there
    queue_seconds: float | None = None  # from arrival to the first step; with the first output


@dataclass(frozen=True)
class Completion:
    """A finished request. `token_ids` include the token that ended it; `prompt_logprobs` belong to tokens 1, 2, … of the prompt."""

    token_ids: list[int]
    finish_reason: str
    logprobs: list[float]
    prompt_logprobs: list[float]


@dataclass(frozen=True)
class EngineStats:
    """Counters since the start, and the present load."""

    num_running: int
    num_waiting: int
    kv_cache_usage: float  # share of pages that requests or cached prefixes hold
    num_cached_pages: int
    kv_cache_held: float  # share of pages that requests hold; prefixes beyond it give way when somebody needs their pages
    prompt_tokens: int
    generation_tokens: int
    cached_tokens: int
    preemptions: int
    guessed_tokens: int
    accepted_tokens: int  # of the guessed ones
    guessed_steps: int  # steps that had guesses in them
    draft_seconds: float  # spent on making guesses; beside step_seconds
    steps: int
    step_seconds: float  # inside the model
