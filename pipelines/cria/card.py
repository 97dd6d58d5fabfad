"""Write cria's manifest and model card from the record of its pretraining.

python pipelines/cria/card.py platform/altiplano/models/cria
"""

import json
import sys
from pathlib import Path

from altiplano.models.manifest import write_manifest

CARD = """# cria, a baby llama

The base model of Altiplano's demo: {parameters:,} parameters in Llama 3.2's architecture (6 layers, hidden size 192, 6 query and 2
key-value heads of 32, tied embeddings, llama3 rope scaling) with a byte-level BPE tokenizer of 2 048 tokens that has Llama 3.2's
special tokens and chat template. Weights are bf16 safetensors, {size:.1f} MB. Licence: Apache-2.0, like the rest of the repository.

## What it can do

Short English dialogues in a small world: greetings, colours, animals, days, small numbers, repeating and spelling words, and
above all reading a note and answering questions about it (who, what, how many, where, when), also as a list or as JSON under keys
that the question names. Outside of this world it knows nothing. It is for demonstrations and tests.

## How it was made

All text comes from `pipelines/cria/corpus.py` by rule from a seed; no other data was used.

    python pipelines/cria/tokenizer.py platform/altiplano/models/cria/weights
    {command} --out platform/altiplano/models/cria/weights

{tokens:,} tokens in {seconds} s on one {device}, torch {torch}. Loss on held-out answers:

| step | training loss | loss of held-out answers | greedy tokens right |
|---|---|---|---|
{curve}
"""


def main() -> None:
    directory = Path(sys.argv[1])
    weights = directory / "weights"
    record = json.loads((weights / "pretraining.json").read_text())
    points = record["curve"]
    shown = [*points[: -1 : max(1, len(points) // 8)], points[-1]]
    rows = [
        f"| {p['step']} | {p['loss']:.4f} | {p['held_out_answer_loss']:.5f} | {p['held_out_answer_accuracy']:.4%} |"
        for p in shown
    ]
    size = (weights / "model.safetensors").stat().st_size
    text = CARD.format(**record | {"curve": "\n".join(rows)}, size=size / 1e6, parameters=2_755_008)
    (directory / "MODEL_CARD.md").write_text(text)
    write_manifest(weights)


if __name__ == "__main__":
    main()
