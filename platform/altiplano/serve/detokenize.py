"""Tokens to text as they come: whole characters only, and stop strings found across token borders."""

from tokenizers import Tokenizer

BROKEN = "\ufffd"  # what an unfinished UTF-8 sequence decodes to


class TextStream:
    """The text of one answer. `push` returns what may be shown now; text that may become a stop string is held back."""

    def __init__(self, tokenizer: Tokenizer, stops: list[str]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._ids: list[int] = []
        self._settled = 0  # ids before this are decoded for good
        self._text = self._held = ""
        self.stopped = False

    @property
    def text(self) -> str:
        """Everything shown so far."""
        return self._text

    def push(self, token_id: int) -> str:
        """Take one token; returns the new text. After a stop string nothing more is shown, and `stopped` is true."""
        self._ids.append(token_id)
        before = self._tokenizer.decode(self._ids[self._settled : -1], skip_special_tokens=True)
        whole = self._tokenizer.decode(self._ids[self._settled :], skip_special_tokens=True)
        if whole.endswith(BROKEN):
            return ""
        fresh = whole[len(before.rstrip(BROKEN)) :]
        # Decode from a few tokens back, because a token's text can depend on the one before it.
        self._settled = max(0, len(self._ids) - 4) if not self._tail_is_broken() else self._settled
        return self._show(fresh)

    def finish(self) -> str:
        """What was held back, at the end of the answer."""
        rest, self._held = ("" if self.stopped else self._held), ""
        self._text += rest
        return rest

    def _show(self, fresh: str) -> str:
        if self.stopped:
            return ""
        pending = self._held + fresh
        found = [at for stop in self._stops if (at := pending.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            shown = pending[: min(found)]
        else:
            keep = max((_overlap(pending, stop) for stop in self._stops), default=0)
            shown, self._held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        self._text += shown
        return shown

    def _tail_is_broken(self) -> bool:
        return bool(self._tokenizer.decode(self._ids[max(0, len(self._ids) - 4) :], skip_special_tokens=True).startswith(BROKEN))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
