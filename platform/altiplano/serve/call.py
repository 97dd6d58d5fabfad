"""One HTTP request on its way through the front end: who asks, what it may use, what it has used.

The middleware makes it; handlers and the engine's client find it through a context variable, as tracing libraries do, so that
nothing between them has to pass it on.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from altiplano.serve import limits
from altiplano.serve.keys import Key
from altiplano.serve.limits import ANONYMOUS, Quota
from altiplano.serve.metrics import Labels
from altiplano.serve.routes import Entry

if TYPE_CHECKING:
    from altiplano.serve.governance import Governance

_current: ContextVar["Call | None"] = ContextVar("altiplano_call", default=None)


@dataclass(eq=False)
class Call:
    """Times are of the governance's clock, in seconds. `gone` says why the client did not get the whole answer."""

    governance: "Governance"
    request_id: str
    method: str
    route: str
    started: float
    entry: Entry | None = None
    key: Key | None = None
    quota: Quota | None = None
    places: int = 0  # in the queue
    model: str = ""
    arm: str = ""
    weights: str = ""  # what answered: the base, or an adapter with the digest of its files
    priority: int = 0  # in the engine, lower ones first
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    unfinished: dict[str, Callable[[], None]] = field(default_factory=dict)  # how to abort what the engine still does for it
    stopped: set[str] = field(default_factory=set)  # of its answers in the engine: a stop string was found, the text is complete
    finish_reasons: list[str] = field(default_factory=list)
    first_token: float | None = None
    ended: float = 0.0
    status: int = 0
    gone: str | None = None
    error: str | None = None  # its code, when it was refused
    cache: str | None = None
    span: Any = None
    trace_id: str | None = None

    @property
    def key_id(self) -> str:
        return self.key.id if self.key else ANONYMOUS

    def labels(self, arm: str) -> Labels:
        return Labels(self.model, arm, self.key_id)

    @property
    def computed(self) -> bool:
        """Whether the engine has worked for it."""
        return bool(self.weights) and self.status in (0, 200)

    def admit(self, model: str, prompt_tokens: int, answers: int) -> None:
        """Take a checked request for the engine: its places in the queue and its prompt's tokens.

        Raises:
            ApiError: 429 when the endpoint is full or the key has used its tokens; 400 when it can never fit.
        """
        now = self.governance.clock()
        self.governance.queue.enter(answers, now, self.key_id, held=self.places)
        self.places = max(self.places, answers)
        if self.quota is not None:
            self.quota.charge_prompt(prompt_tokens, now)
        self.model, self.prompt_tokens = model, prompt_tokens

    def abort(self) -> None:
        """Nobody waits any more: the engine frees the pages now, not when the handler's generators are collected."""
        for abort in self.unfinished.values():
            abort()
        self.unfinished.clear()

    def check_values(self, body: Any) -> None:
        """
        Raises:
            ApiError: 400, the body is too deep or has too many values.
        """
        limits.check_values(body, self.governance.limits)

    def check_schema(self, schema: Any, param: str = "response_format") -> None:
        """
        Raises:
            ApiError: 400, the JSON schema is too large.
        """
        limits.check_schema(schema, self.governance.limits, param)

    def fields(self) -> dict[str, Any]:
        """What a log line says about it; nothing that was asked or answered."""
        said: dict[str, Any] = {
            "request_id": self.request_id,
            "trace_id": self.trace_id,
            "method": self.method,
            "route": self.route,
            "status": self.status,
            "seconds": round(self.ended - self.started, 6),
            "key": self.key_id,
            "gone": self.gone,
            "error": self.error,
            "cache": self.cache,
        }
        if self.model:
            said |= {
                "model": self.model,
                "arm": self.arm,
                "prompt_tokens": self.prompt_tokens,
                "cached_tokens": self.cached_tokens,
                "generation_tokens": self.generation_tokens,
                "finish_reasons": self.finish_reasons,
                "ttft_s": None if self.first_token is None else round(self.first_token - self.started, 6),
            }
        return {name: value for name, value in said.items() if value is not None}


def set_current(call: Call) -> None:
    """For this task and the tasks that it starts."""
    _current.set(call)


def current_call() -> Call | None:
    """The call that this task works for; None outside of one (a benchmark that drives the engine's client itself)."""
    return _current.get()
