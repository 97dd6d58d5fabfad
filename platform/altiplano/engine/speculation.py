"""Guesses at the next tokens from the text itself: what followed the last words where they occurred before.

Answers that copy from their prompt (extraction, rewriting, code) are guessed well and cost nothing to guess. A guess that is
right saves a step; the engine draws every token itself, from the same logits with the same noise, so guesses change no answer.
Prompt lookup: Saxena (2023); verification of several tokens in one pass: Leviathan, Kalman and Matias (2023).
"""

LONGEST, SHORTEST = 3, 2
MAX_REST = 64


class Caution:
    """How many tokens to guess for one request, at most `most`: more after right guesses, fewer and after longer and longer pauses after wrong ones."""

    def __init__(self, most: int) -> None:
        self._most = self._length = most
        self._rest = self._misses = 0

    def allowance(self) -> int:
        """Guesses for the next step; 0 during a pause, which every call makes shorter."""
        if self._rest:
            self._rest -= 1
            return 0
        return self._length

    def observe(self, proposed: int, accepted: int) -> None:
        """How many of the last guesses were right."""
        if accepted:
            self._misses = 0
            self._length = min(self._most, 2 * self._length if accepted == proposed else accepted + 1)
        elif proposed:
            self._misses += 1
            self._length = max(1, self._length // 2)
            self._rest = min(2**self._misses, MAX_REST)


class PromptLookup:
    """Guesses for one request from its own text, `most` tokens at a time."""

    def __init__(self, most: int) -> None:
        self._caution = Caution(most)
        self._after: dict[tuple[int, ...], int] = {}  # where the token after the latest of these words is
        self._known = 0

    def propose(self, tokens: list[int], limit: int) -> tuple[int, ...]:
        """Up to `limit` guesses at what follows `tokens`, which has only grown since the last call."""
        for end in range(max(self._known, SHORTEST), len(tokens)):
            for n in range(SHORTEST, min(LONGEST, end) + 1):
                self._after[tuple(tokens[end - n : end])] = end
        self._known = len(tokens)
        length = min(self._caution.allowance(), limit)
        for n in range(LONGEST, SHORTEST - 1, -1):
            at = self._after.get(tuple(tokens[-n:])) if len(tokens) >= n else None
            if at is not None:
                return _from(tokens, at, length)
        return ()

    def observe(self, proposed: int, accepted: int) -> None:
        """How many of the last guesses were right."""
        self._caution.observe(proposed, accepted)


def _from(tokens: list[int], at: int, count: int) -> tuple[int, ...]:
    """`count` tokens from `at` on; a text that ends within them goes on as it did from `at` on."""
    found = tokens[at : at + count]
    while len(found) < count:
        found.append(found[len(found) - (len(tokens) - at)])
    return tuple(found)
