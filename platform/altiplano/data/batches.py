"""Global steps of a constant number of tokens, whatever the number of workers.

The schedule is made once from lengths and a seed. Workers only decide how a step is cut into micro-batches, so an elastic
run that loses a worker optimises exactly as before.
"""

import random
from collections.abc import Sequence
from typing import Any

import torch

from altiplano.data.packing import pack_best_fit
from altiplano.data.templates import IGNORED, Example

Pack = list[int]  # indices of rows that share one sequence
Step = list[Pack]


def plan_steps(
    lengths: Sequence[int], *, tokens_per_step: int, max_length: int, packing: bool, seed: int, epochs: float
) -> list[Step]:
    """All global steps of a run: every epoch a new order, each step at most `tokens_per_step` tokens (at least one pack).

    A fraction of an epoch ends after that share of the epoch's steps.
    """
    steps: list[Step] = []
    epoch, left = 0, epochs
    while left > 1e-9:
        whole = _epoch(lengths, tokens_per_step, max_length, packing, random.Random(f"{seed}/{epoch}"))
        steps += whole if left >= 1 else whole[: max(1, round(len(whole) * left))]
        epoch, left = epoch + 1, left - 1
    return steps


def shard(step: Step, lengths: Sequence[int], *, rank: int, world_size: int, micro_batch_tokens: int) -> list[Step]:
    """The micro-batches of one worker: lists of packs with at most `micro_batch_tokens` tokens (at least one pack).

    All ranks get the same number, because gradients are summed in step; a rank without work gets empty micro-batches.
    """
    shares: list[Step] = [[] for _ in range(world_size)]
    load = [0] * world_size
    for pack in sorted(step, key=lambda p: (-_size(p, lengths), p)):
        lightest = min(range(world_size), key=lambda r: (load[r], r))
        shares[lightest].append(pack)
        load[lightest] += _size(pack, lengths)
    cut = [_cut(share, lengths, micro_batch_tokens) for share in shares]
    longest = max(len(micro) for micro in cut)
    return cut[rank] + [[] for _ in range(longest - len(cut[rank]))]


def collate(packs: Step, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """A micro-batch: input_ids, labels, position_ids, each int64 [packs, tokens of the longest pack].

    Positions restart at every row of data: attention kernels and transformers' masks read the borders from them, so no row
    sees another. The first label of each row is ignored, because its prediction would come from the row before. Padding is a
    row without labels. An empty micro-batch becomes one token without a label.
    """
    width = max((sum(len(examples[index].input_ids) for index in pack) for pack in packs), default=1)
    ids = torch.zeros((max(1, len(packs)), width), dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    positions = torch.zeros_like(ids)
    for row, pack in enumerate(packs):
        at = 0
        for index in pack:
            example = examples[index]
            end = at + len(example.input_ids)
            ids[row, at:end] = torch.tensor(example.input_ids)
            labels[row, at + 1 : end] = torch.tensor(example.labels[1:])
            positions[row, at:end] = torch.arange(end - at)
            at = end
        positions[row, at:] = torch.arange(width - at)
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def supervised(step: Any, examples: Sequence[Example]) -> int:
    """How many predictions count in the loss of a global step."""
    return sum(label != IGNORED for pack in step for index in pack for label in examples[index].labels[1:])


def _epoch(lengths: Sequence[int], tokens_per_step: int, max_length: int, packing: bool, order: random.Random) -> list[Step]:
    packs = pack_best_fit(lengths, max_length) if packing else [[index] for index in range(len(lengths))]
    order.shuffle(packs)
    steps: list[Step] = []
    tokens = tokens_per_step
    for pack in packs:
        size = _size(pack, lengths)
        if tokens + size > tokens_per_step:
            steps.append([])
            tokens = 0
        steps[-1].append(pack)
        tokens += size
    return steps


def _cut(share: Step, lengths: Sequence[int], limit: int) -> list[Step]:
    micro: list[Step] = []
    tokens = limit
    for pack in share:
        size = _size(pack, lengths)
        if not micro or tokens + size > limit:
            micro.append([])
            tokens = 0
        micro[-1].append(pack)
        tokens += size
    return micro


def _size(pack: Pack, lengths: Sequence[int]) -> int:
    return sum(lengths[index] for index in pack)
