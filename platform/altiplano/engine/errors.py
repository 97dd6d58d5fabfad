"""What can be wrong with a request, an adapter or a checkpoint; each message says what to change."""


class EngineError(ValueError):
    """Base of the errors that a caller can mend."""


class PromptTooLongError(EngineError):
    """Prompt and answer do not fit into the context or the cache."""


class UnknownAdapterError(EngineError):
    """No adapter of that name is loaded."""


class AdapterError(EngineError):
    """An adapter that does not fit: another base, a rank above the maximum, a kind that the engine does not run."""


class EngineAsleepError(EngineError):
    """The engine sleeps; nothing runs before it is woken up."""


class WeightsError(EngineError):
    """A checkpoint with missing or mis-shaped tensors, of an unknown kind, or not in safetensors."""
