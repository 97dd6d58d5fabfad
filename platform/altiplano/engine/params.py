"""How tokens are drawn for one request, under the names of vLLM."""

import math
from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class SamplingParams:
    """Sampling of one request. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 filter nothing.

    `logprobs`: how many of the most likely tokens to report beside each chosen one (0: the chosen one only, None: nothing).
    `prompt_logprobs`: report the log-probability of every prompt token after the first.
    `structured`: a token is drawn only from a set that the caller names before each step (`Engine.allow`).

    Raises:
        ValueError: a value out of range or not finite; the message names the field.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = field(default=None, hash=False)
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: bool = False
    structured: bool = False

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{item.name} must be a finite number, not {value}")
        _check("max_tokens", self.max_tokens, self.max_tokens >= 0, "at least 0")
        _check("min_tokens", self.min_tokens, 0 <= self.min_tokens <= max(self.max_tokens, 0), "between 0 and max_tokens")
        _check("temperature", self.temperature, 0 <= self.temperature <= 100, "between 0 and 100")
        _check("top_k", self.top_k, 0 <= self.top_k < 2**31, "0 (no limit) or more, and below 2^31")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 and 1")
        _check("presence_penalty", self.presence_penalty, -2 <= self.presence_penalty <= 2, "between -2 and 2")
        _check("frequency_penalty", self.frequency_penalty, -2 <= self.frequency_penalty <= 2, "between -2 and 2")
        _check("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty <= 10, "above 0 and at most 10")
        if self.seed is not None:
            _check("seed", self.seed, -(2**63) <= self.seed < 2**63, "a 64-bit integer")
        if self.logprobs is not None:
            _check("logprobs", self.logprobs, 0 <= self.logprobs <= 20, "between 0 and 20")
        if self.structured and (self.min_tokens or self.ignore_eos):
            raise ValueError(
                "min_tokens and ignore_eos do not go with structured output: its grammar decides where an answer ends"
            )
        for token, bias in (self.logit_bias or {}).items():
            _check(f"logit_bias[{token}]", bias, math.isfinite(bias) and -100 <= bias <= 100, "between -100 and 100")

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5

    @property
    def penalized(self) -> bool:
        """Whether the choice depends on what was said before."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1


def _check(name: str, value: object, fine: bool, wanted: str) -> None:
    if not fine:
        raise ValueError(f"{name} must be {wanted}, not {value}")
