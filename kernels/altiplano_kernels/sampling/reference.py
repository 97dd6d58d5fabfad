"""Sampling in torch. The noise of a row depends on its own seed and step only, so a request draws the same tokens in any batch."""

import torch

_MASK32 = 0xFFFFFFFF


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """int64 [batch] for logits: [batch, vocab]; the lowest id among equals."""
    return logits.argmax(-1)


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    steps: torch.Tensor,
) -> torch.Tensor:
    """One token per row, by adding Gumbel noise to the filtered, tempered logits and taking the largest.

    logits: float32 [batch, vocab]; temperature, top_p, min_p: float32 [batch] (temperature > 0); top_k: int64 [batch], 0 for
    no limit; seeds, steps: int64 [batch]. Filters in the order of vLLM: top-k, top-p, min-p. Returns int64 [batch].
    """
    scaled = logits / temperature[:, None]
    ranked, order = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)[None, :]
    limit = torch.where(top_k > 0, top_k, logits.shape[1])[:, None]
    ranked = ranked.masked_fill(rank >= limit, float("-inf"))
    probabilities = ranked.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    drop = (before >= top_p[:, None]) | (probabilities < min_p[:, None] * probabilities[:, :1])
    drop[:, 0] = False
    ranked = ranked.masked_fill(drop, float("-inf"))
    filtered = torch.empty_like(ranked).scatter_(1, order, ranked)
    return (filtered + gumbel(seeds, steps, logits.shape[1])).argmax(-1)


def gumbel(seeds: torch.Tensor, steps: torch.Tensor, vocab: int) -> torch.Tensor:
    """Standard Gumbel noise, float32 [batch, vocab], from a counter-based hash of (seed, step, token id)."""
    ids = torch.arange(vocab, device=seeds.device)[None, :]
    state = _mix((seeds & _MASK32) ^ _mix(seeds >> 32 & _MASK32))[:, None]
    bits = _mix(_mix(state ^ steps[:, None]) ^ ids)
    uniform = (bits.float() + 0.5) * 2.0**-32
    # At most the largest float below one: its noise must stay finite.
    return -torch.log(-torch.log(uniform.clamp(max=1.0 - 2.0**-24)))


def penalize(
    logits: torch.Tensor,
    counts: torch.Tensor,
    prompt: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    repetition: torch.Tensor,
) -> torch.Tensor:
    """Lower what was said before. counts: [batch, vocab] uses in the output; prompt: bool [batch, vocab]; the rest float32 [batch].

    Presence and frequency as in OpenAI's API (output only); repetition as in CTRL (Keskar et al., 2019; prompt and output).
    """
    seen = (counts > 0) | prompt
    factor = torch.where(seen, repetition[:, None], 1.0)
    logits = torch.where(logits > 0, logits / factor, logits * factor)
    return logits - frequency[:, None] * counts - presence[:, None] * (counts > 0)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit integers with good avalanche (lowbias32, C. Wellons); int64 in and out."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK32
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK32
    return x ^ (x >> 16)
