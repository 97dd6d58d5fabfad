"""Sets of tokens that may come next, as bits, applied to logits."""

from collections.abc import Sequence

import torch


def forbid(logits: torch.Tensor, allowed: Sequence[bytes | None]) -> None:
    """Set to -inf, in place, what each row's set leaves out. logits: float32 [rows, vocab]; None leaves a row alone.

    Bit i % 8 of byte i // 8 stands for token i, lowest bit first. Sets may be longer than the vocabulary (padding), not shorter.
    """
    rows = [row for row, bits in enumerate(allowed) if bits is not None]
    if not rows:
        return
    vocab = logits.shape[1]
    packed = bytearray(b"".join(bits[: -(-vocab // 8)] for bits in allowed if bits is not None))
    bits = torch.frombuffer(packed, dtype=torch.uint8).view(len(rows), -1, 1).to(logits.device)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=logits.device)
    banned = ((bits & weights) == 0).view(len(rows), -1)[:, :vocab]
    at = torch.tensor(rows, device=logits.device)
    logits[at] = logits[at].masked_fill(banned, float("-inf"))
