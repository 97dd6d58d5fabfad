"""Draws that need more than the graph knows: log-probabilities, penalties, bias, allowed tokens. Everything else stays in the graph."""

from collections.abc import Sequence

import torch

from altiplano.engine.masks import forbid
from altiplano.engine.params import SamplingParams
from altiplano.engine.plan import Chunk
from altiplano.engine.runner import Drawn
from altiplano_kernels.sampling import reference as sampling


def is_plain(params: SamplingParams, generated: int) -> bool:
    """Whether the graph's own draw (greedy or tempered, under top-k, top-p and min-p, nothing to report) serves the request."""
    reported = params.logprobs is not None or (params.prompt_logprobs and generated == 0)
    return not (reported or params.penalized or params.logit_bias or params.structured or generated < params.min_tokens)


def draw(chunks: Sequence[Chunk], logits: torch.Tensor, eos: tuple[int, ...]) -> list[Drawn]:
    """One token per row of logits: float32 [rows, vocab] on the GPU."""
    processed = _process(chunks, logits, eos)
    tokens = sampling.greedy(processed)
    random = [row for row, chunk in enumerate(chunks) if not chunk.params.greedy]
    if random:

        def column(values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=logits.device)

        params = [chunks[row].params for row in random]
        tokens[random] = sampling.sample(
            processed[random],
            column([p.temperature for p in params], torch.float32),
            column([p.top_k for p in params], torch.int64),
            column([p.top_p for p in params], torch.float32),
            column([p.min_p for p in params], torch.float32),
            column([chunks[row].seed for row in random], torch.int64),
            column([chunks[row].generated for row in random], torch.int64),
        )
    chosen = tokens.tolist()
    if all(chunk.params.logprobs is None for chunk in chunks):
        return [Drawn(token) for token in chosen]
    logprobs = logits.log_softmax(-1)
    return [_report(chunk, token, logprobs[row]) for row, (chunk, token) in enumerate(zip(chunks, chosen, strict=True))]


def _process(chunks: Sequence[Chunk], logits: torch.Tensor, eos: tuple[int, ...]) -> torch.Tensor:
    """Penalties, bias and the ban of end tokens before min_tokens; the logits themselves when nobody asks."""
    if not any(c.params.penalized or c.params.logit_bias or c.allowed or c.generated < c.params.min_tokens for c in chunks):
        return logits
    logits = logits.clone()
    for row, chunk in enumerate(chunks):
        params = chunk.params
        if chunk.history is not None:
            counts, prompt = (_counts(tokens, logits) for tokens in (chunk.history[1], chunk.history[0]))
            strengths = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
            columns = (torch.tensor([value], device=logits.device) for value in strengths)
            logits[row : row + 1] = sampling.penalize(logits[row : row + 1], counts, prompt > 0, *columns)
        for token, bias in (params.logit_bias or {}).items():
            logits[row, token] += bias
        if chunk.generated < params.min_tokens:
            logits[row, [*eos, *params.stop_token_ids]] = float("-inf")
    forbid(logits, [chunk.allowed for chunk in chunks])
    return logits


def _counts(tokens: tuple[int, ...], logits: torch.Tensor) -> torch.Tensor:
    ids = torch.tensor(tokens, dtype=torch.int64, device=logits.device)
    return torch.bincount(ids, minlength=logits.shape[1]).float()[None]


def _report(chunk: Chunk, token: int, logprobs: torch.Tensor) -> Drawn:
    if chunk.params.logprobs is None:
        return Drawn(token)
    values, ids = logprobs.topk(chunk.params.logprobs)
    return Drawn(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
