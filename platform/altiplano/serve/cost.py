"""What each key and model used, and its share of the replica's price.

A replica costs the same whether it works or not. Time in which nothing ran is `idle`; the rest is divided among the tokens that
were computed in it, so that shares and idle time always add up to price times time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from altiplano.serve.metrics import Labels

# A prompt token takes about a fifth of a generated one's time (prefill 285 000 tokens/s, decode of a full batch 59 500, Llama 3.2 1B
# on an H200: benchmarks/results/engine.json); one found in the prefix cache takes none.
PROMPT_WEIGHT = 0.2
IDLE = Labels("", "", "idle")
DIVIDE_EVERY_S = 1.0


@dataclass
class Account:
    """What was used under one set of labels. `usd` is 0 without a price; `weight` is work that is not priced yet."""

    answers: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    usd: float = 0.0
    weight: float = 0.0

    def prompt(self, tokens: int, cached: int) -> None:
        """A prompt was computed, but for its `cached` first tokens."""
        self.prompt_tokens += tokens
        self.cached_tokens += cached
        self.weight += PROMPT_WEIGHT * (tokens - cached)

    def token(self) -> None:
        """One token was generated."""
        self.generation_tokens += 1
        self.weight += 1.0

    @property
    def usd_per_million_tokens(self) -> float | None:
        """usd / (prompt + generated tokens) * 1e6; None before the first token."""
        tokens = self.prompt_tokens + self.generation_tokens
        return self.usd / tokens * 1e6 if tokens else None


@dataclass
class Ledger:
    """Accounts of one replica. `now` in seconds of any monotonic clock, never running backwards."""

    usd_per_hour: float | None
    now: float
    accounts: dict[Labels, Account] = field(default_factory=dict)
    _running: int = 0
    _unshared: float = 0.0  # price of busy time since the last division
    _divided: float = 0.0
    _latest: Account | None = None  # that an answer ended for

    def begin(self, labels: Labels, now: float) -> Account:
        """An answer is being computed from here on, for the account that is returned."""
        self._advance(now)
        self._running += 1
        account = self.account(labels)
        account.answers += 1
        return account

    def end(self, account: Account, now: float) -> None:
        """An answer has ended, for whatever reason."""
        self._advance(now)
        self._running -= 1
        self._latest = account
        if now - self._divided >= DIVIDE_EVERY_S:
            self._divide()

    def account(self, labels: Labels) -> Account:
        found = self.accounts.get(labels)
        if found is None:
            found = self.accounts[labels] = Account()
        return found

    def settle(self, now: float) -> list[tuple[Labels, Account]]:
        """All accounts, with everything until `now` divided."""
        self._advance(now)
        self._divide()
        return list(self.accounts.items())

    def _advance(self, now: float) -> None:
        usd = (self.usd_per_hour or 0.0) * (now - self.now) / 3600
        self.now = now
        if self._running:
            self._unshared += usd
        elif usd:
            self.account(IDLE).usd += usd

    def _divide(self) -> None:
        self._divided = self.now
        total = sum(account.weight for account in self.accounts.values())
        if not total:
            # Busy, and not one token: who left last pays when nobody is there any more, else it waits for the first token.
            if self._latest is None or self._running:
                return
            self._latest.weight = total = 1.0
        for account in self.accounts.values():
            account.usd += self._unshared * account.weight / total
            account.weight = 0.0
        self._unshared = 0.0


class CostCollector(Collector):
    """`altiplano_cost_usd_total` from a ledger that has a price."""

    def __init__(self, ledger: Ledger, clock: Callable[[], float]) -> None:
        self._ledger, self._clock = ledger, clock

    def collect(self) -> Iterator[CounterMetricFamily]:
        if self._ledger.usd_per_hour is None:
            return
        text = "Share of the replica's price; time in which nothing ran has the key `idle`"
        family = CounterMetricFamily("altiplano_cost_usd", text, labels=["model", "arm", "key"])
        for labels, account in self._ledger.settle(self._clock()):
            family.add_metric([labels.model, labels.arm, labels.key], account.usd)
        yield family


def report(ledger: Ledger, now: float, key_id: str | None) -> dict[str, Any]:
    """What /v1/usage answers: all accounts, or one key's. Since the replica started."""
    rows = [
        {
            "model": labels.model,
            "arm": labels.arm,
            "key": labels.key,
            "requests": account.answers,
            "prompt_tokens": account.prompt_tokens,
            "cached_tokens": account.cached_tokens,
            "completion_tokens": account.generation_tokens,
            "cost_usd": None if ledger.usd_per_hour is None else account.usd,
            "usd_per_million_tokens": None if ledger.usd_per_hour is None else account.usd_per_million_tokens,
        }
        for labels, account in ledger.settle(now)
        if key_id is None or labels.key == key_id
    ]
    return {"object": "list", "data": rows}
