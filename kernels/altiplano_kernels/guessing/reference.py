"""What the kernels do, in Python."""

from collections.abc import Sequence


def look_up(text: Sequence[int], k: int) -> list[int]:
    """`k` guesses at what follows `text`; [-1] * k where its last words did not occur before."""
    for words in (3, 2):
        if len(text) <= words:
            continue
        ends = [end for end in range(words - 1, len(text) - 1) if list(text[end - words + 1 : end + 1]) == list(text[-words:])]
        if ends:
            after = ends[-1] + 1
            return [text[after + j % (len(text) - after)] for j in range(k)]
    return [-1] * k


def count_right(guesses: Sequence[int], drawn: Sequence[int]) -> int:
    """How many of `guesses` were drawn, up to the first that was not. drawn: one more than guesses."""
    return next((j for j, guess in enumerate(guesses) if drawn[j] != guess), len(guesses))
