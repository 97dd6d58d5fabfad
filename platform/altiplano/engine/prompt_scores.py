"""Log-probabilities of what a prompt says, read off the logits that computing it gives anyway."""

from dataclasses import replace

import torch

from altiplano.engine.plan import Chunk
from altiplano.engine.runner import Drawn


def with_prompt(drawn: Drawn, chunk: Chunk, logits: torch.Tensor) -> Drawn:
    """Add the known token after each token of the chunk, and the most likely ones beside it when `logprobs` asks for them.

    logits: float32 [tokens of the chunk, vocab]; the last row belongs to the draw when the chunk ends the prompt.
    """
    targets = torch.tensor(chunk.next_tokens, dtype=torch.int64, device=logits.device)
    rows = logits[: len(targets)].log_softmax(-1)
    chosen = tuple(rows.gather(1, targets[:, None])[:, 0].tolist())
    if not chunk.params.logprobs:
        return replace(drawn, prompt_logprobs=chosen)
    values, ids = rows.topk(chunk.params.logprobs)
    top = (tuple(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True))
    return replace(drawn, prompt_logprobs=chosen, prompt_top=tuple(top))
