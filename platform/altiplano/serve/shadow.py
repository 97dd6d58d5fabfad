"""Shadow traffic: an arm answers again what another arm has answered, nobody sees it, and both answers are compared.

The copy starts when the user's answer is complete, goes behind every user's request in the engine, and is left out while the engine
is half full or enough copies run. So it delays nobody who would notice, and holds a bounded number of prompts in memory.
"""

import asyncio
import contextvars
import logging
import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from altiplano.serve.call import Call, set_current
from altiplano.serve.engine_errors import AsleepError
from altiplano.serve.outcomes import Sums
from altiplano.serve.protocol import ChatRequest, CompletionRequest
from altiplano.serve.usage import Usage

if TYPE_CHECKING:
    from altiplano.serve.generation import Generator, Piece

MAX_RUNNING = 2
MAX_SECONDS = 120.0
# The engine serves lower values first; users have 0.
PRIORITY = 1_000
ROUTE = MODEL = "shadow"

log = logging.getLogger("altiplano.serve")


@dataclass
class ShadowSums:
    """Answers given twice. `greedy` ones can be equal word by word, and `identical` of them were; lengths in tokens, TTFT in seconds."""

    compared: int = 0
    failed: int = 0
    skipped: int = 0
    greedy: int = 0
    identical: int = 0
    length_ratio: Sums = field(default_factory=Sums)
    ttft: Sums = field(default_factory=Sums)
    shadow_ttft: Sums = field(default_factory=Sums)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ShadowSums":
        """The inverse of `dataclasses.asdict`."""
        read: dict[str, Any] = {name: Sums(**value) if isinstance(value, Mapping) else value for name, value in values.items()}
        return cls(**read)

    @classmethod
    def merged(cls, parts: "Iterable[ShadowSums]") -> "ShadowSums":
        """Those of several replicas together; without histograms."""
        total = cls()
        for part in parts:
            for name, value in vars(part).items():
                mine = getattr(total, name)
                setattr(total, name, mine + value if isinstance(value, int) else _added(mine, value))
        return total

    def described(self) -> dict[str, float | None]:
        """Numbers for people. Ratios are of geometric means, the shadow's to the user's."""
        ttfts = (self.ttft.mean, self.shadow_ttft.mean)
        return {
            "compared": self.compared,
            "failed": self.failed,
            "skipped": self.skipped,
            "exact_match": self.identical / self.greedy if self.greedy else None,
            "length_ratio": None if self.length_ratio.mean is None else math.exp(self.length_ratio.mean),
            "ttft_ratio": None if ttfts[0] is None or ttfts[1] is None else math.exp(ttfts[1] - ttfts[0]),
        }


@dataclass
class Shadow:
    """Mirrors `fraction` of the requests of other arms to `arm`."""

    arm: str
    fraction: float
    sums: ShadowSums = field(default_factory=ShadowSums)
    _running: "set[asyncio.Task[None]]" = field(default_factory=set)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Shadow":
        """From the `shadow` of a user_config: {"arm": name, "fraction": 0 … 1}.

        Raises:
            ValueError: what to change.
        """
        if set(values) != {"arm", "fraction"}:
            raise ValueError(f"shadow has the keys {sorted(values)}: use arm and fraction")
        arm, fraction = values["arm"], values["fraction"]
        if (
            not isinstance(arm, str)
            or isinstance(fraction, bool)
            or not isinstance(fraction, int | float)
            or not 0 <= fraction <= 1
        ):
            raise ValueError(f"shadow is {dict(values)}: use the name of an arm, and a fraction from 0 to 1")
        return cls(arm, float(fraction))

    def mirror(self, generator: "Generator", call: Call, request: ChatRequest | CompletionRequest) -> "Mirror | None":
        """What listens to an answer in order to give it again; None for a request that is not mirrored."""
        # Only where one answer is told from another, and never a copy of a copy.
        if call.entry is None or call.arm == self.arm or request.n > 1 or random.random() >= self.fraction:
            return None
        if isinstance(request, CompletionRequest) and len(request.prompts()) > 1:
            return None
        if call.governance.queue.size > generator.settings.max_num_seqs // 2:
            self.sums.skipped += 1
            return None
        return Mirror(self, generator, call, request)

    def begin(self, mirror: "Mirror", prompt: list[int]) -> None:
        """The user's answer is complete: give it again, unless others are being given again."""
        if len(self._running) >= MAX_RUNNING:
            self.sums.skipped += 1
            return
        task = asyncio.create_task(self._again(mirror, prompt), context=contextvars.Context())
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _again(self, mirror: "Mirror", prompt: list[int]) -> None:
        user, generator = mirror.call, mirror.generator
        call = Call(user.governance, f"shadow-{user.request_id}", user.method, ROUTE, user.governance.clock())
        # Labels of its own, no quota, no key: users pay neither in money nor in tokens per minute.
        call.model, call.arm, call.priority = MODEL, self.arm, PRIORITY
        set_current(call)
        request = mirror.request.model_copy(update={"model": self.arm})
        parts: list[str] = []
        try:
            async with asyncio.timeout(MAX_SECONDS):
                async for piece in generator.stream(request, [prompt], Usage()):
                    parts.append(piece.text)
        except AsleepError:
            self.sums.skipped += 1  # no arm's failure, as with users' answers
            return
        except Exception as error:
            log.warning("a shadow answer of %s failed: %s", self.arm, error)
            self.sums.failed += 1
            return
        self._compare(mirror, call, "".join(parts))

    def _compare(self, mirror: "Mirror", call: Call, text: str) -> None:
        sums, user = self.sums, mirror.call
        sums.compared += 1
        if mirror.request.temperature == 0:
            sums.greedy += 1
            sums.identical += text == "".join(mirror.parts)
        if user.generation_tokens and call.generation_tokens:
            sums.length_ratio.add(math.log(call.generation_tokens / user.generation_tokens))
        if user.first_token is not None and call.first_token is not None:
            sums.ttft.add(math.log(max(user.first_token - user.started, 1e-6)))
            sums.shadow_ttft.add(math.log(max(call.first_token - call.started, 1e-6)))


@dataclass
class Mirror:
    """One user's answer on its way, to be given again."""

    shadow: Shadow
    generator: "Generator"
    call: Call
    request: ChatRequest | CompletionRequest
    parts: list[str] = field(default_factory=list)

    def saw(self, piece: "Piece") -> None:
        self.parts.append(piece.text)

    def begin(self, prompt: list[int]) -> None:
        """The answer is complete."""
        self.shadow.begin(self, prompt)


def _added(a: Sums, b: Sums) -> Sums:
    return Sums(a.count + b.count, a.total + b.total, a.squares + b.squares)
