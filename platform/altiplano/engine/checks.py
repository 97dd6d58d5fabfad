"""What every engine refuses, in the same words."""

from collections.abc import Collection, Iterable, Sequence

from altiplano.engine.errors import AdapterError, EngineAsleepError, EngineError, PromptTooLongError, UnknownAdapterError


def check_prompt(request_id: str, in_use: Collection[str], prompt: Sequence[int]) -> None:
    """
    Raises:
        ValueError: an id that is in use, or an empty prompt.
    """
    if request_id in in_use:
        raise ValueError(f"request id {request_id!r} is in use: give every request its own")
    if not prompt:
        raise ValueError("the prompt is empty: give at least one token")


def check_vocabulary(prompt: Sequence[int], others: Sequence[int], vocab_size: int) -> None:
    """`others`: the token ids of logit_bias and stop_token_ids.

    Raises:
        ValueError: token ids that the model does not have.
    """
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise ValueError(f"the prompt has token ids outside 0 … {vocab_size - 1}: it was made with another tokenizer")
    bad = [token for token in others if not 0 <= token < vocab_size]
    if bad:
        raise ValueError(f"logit_bias and stop_token_ids name token ids {bad[:5]} outside 0 … {vocab_size - 1}")


def check_length(prompt_len: int, max_tokens: int, max_model_len: int, least: int = 0) -> None:
    """`least`: tokens that are drawn however few are asked for.

    Raises:
        PromptTooLongError: prompt and answer do not fit into the context.
    """
    if prompt_len + max(least, max_tokens) > max_model_len:
        raise PromptTooLongError(
            f"{prompt_len} prompt tokens and max_tokens {max_tokens} are more than the context of {max_model_len}: shorten one of them"
        )


def check_loaded(adapter: str | None, adapters: Collection[str]) -> None:
    """
    Raises:
        UnknownAdapterError: `adapter` is none of the loaded ones.
    """
    if adapter is not None and adapter not in adapters:
        raise UnknownAdapterError(f"no adapter {adapter!r} is loaded; loaded: {', '.join(sorted(adapters)) or 'none'}")


def check_room(adapter: str, adapters: Collection[str], max_loras: int) -> None:
    """
    Raises:
        AdapterError: `adapter` is none of the loaded ones, and they are as many as there may be.
    """
    if adapter not in adapters and len(adapters) >= max_loras:
        raise AdapterError(f"{len(adapters)} adapters are loaded, and max_loras is {max_loras}: unload one or raise it")


def check_awake(asleep: bool) -> None:
    """
    Raises:
        EngineAsleepError: it sleeps.
    """
    if asleep:
        raise EngineAsleepError("the engine sleeps: wake it up first")


def check_idle(busy: bool, requests: int) -> None:
    """`busy`: whether anything is to be told of them still.

    Raises:
        EngineError: it cannot sleep yet.
    """
    if busy:
        raise EngineError(f"{requests} requests are under way: wait for them, or abort them, before it sleeps")


def check_unused(adapter: str, used: Iterable[str | None]) -> None:
    """
    Raises:
        AdapterError: `adapter` is among those that requests use.
    """
    if adapter in used:
        raise AdapterError(f"adapter {adapter!r} is in use by running requests: wait for them or abort them")
