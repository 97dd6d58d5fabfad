"""Which LoRA adapters vLLM runs as they are meant. What does not fit it would often take without a word: it copies the matrices of a
smaller base into a corner of its own, and ignores ranks by module."""

import json
from collections.abc import Iterable
from pathlib import Path

from altiplano.engine.config import EngineConfig, LlamaConfig
from altiplano.engine.errors import AdapterError

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of vLLM's LoRAConfig
USUAL_RANK = 64


def room_for(adapters: Iterable[str]) -> int:
    """The rank to make room for: vLLM takes memory for `max_loras` adapters of it at the start, and computes with it whatever they have.

    `adapters`: directories of those that are known now; one that cannot be read is refused when it is loaded.
    """
    ranks = [_rank_of(Path(directory)) for directory in adapters]
    return min(max([USUAL_RANK, *ranks]), LORA_RANKS[-1])


def check_fits(name: str, directory: Path, config: EngineConfig, model: LlamaConfig) -> None:
    """
    Raises:
        AdapterError: unreadable, made for another base, of a kind that vLLM does not run, or of too high a rank.
    """
    rank, room = _rank_of(directory), config.max_lora_rank
    if rank > room:
        raise AdapterError(
            f"{directory} has rank {rank}, and vLLM has made room for {room} at its start: start the endpoint again with this adapter "
            "among its own, or use engine altiplano"
        )
    # The front end's process imports this module, and no torch.
    import torch

    from altiplano.engine.adapters import load_adapter

    found = load_adapter(name, directory, config.model, model, room, torch.bfloat16, "cpu")
    if any(gain is not None for layer in found.pairs for _, _, gain in layer.values()):
        raise AdapterError(f"{directory} is DoRA, which vLLM does not run: merge it into its base, or use engine altiplano")


def _rank_of(adapter: Path) -> int:
    """As its adapter_config.json says; 0 where that cannot be read."""
    try:
        return int(json.loads((adapter / "adapter_config.json").read_text())["r"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
