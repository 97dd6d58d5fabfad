"""The prompt format byte for byte, the mask word for word, and batches that do not depend on the number of workers."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from altiplano.data.batches import collate, plan_steps, shard, supervised
from altiplano.data.packing import pack_best_fit
from altiplano.data.preview import segments
from altiplano.data.templates import ChatTemplate, Example, serving_text
from altiplano.models.cria import cria_path

ORIGINAL = (Path(trl.__file__).parent / "chat_templates/llama3_2.jinja").read_text()
ROOT = Path(__file__).parents[2]
DIALOGUE = [
    {"role": "system", "content": " Be kind.\n"},
    {"role": "user", "content": "What is a cria?"},
    {"role": "assistant", "content": " A baby llama. "},
    {"role": "user", "content": "And a foal?"},
    {"role": "assistant", "content": "A baby horse."},
]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALLS = [
    {"role": "user", "content": "Call it."},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
    {"role": "tool", "content": "42"},
]


@pytest.mark.parametrize(
    ("messages", "tools"), [(DIALOGUE[:2], None), (DIALOGUE[1:], None), (DIALOGUE, None), (CALLS, [TOOL]), (DIALOGUE[:2], [TOOL])]
)
@pytest.mark.parametrize("prompt", [False, True])
def test_the_text_is_that_of_llama_3_2(messages: list[dict[str, Any]], tools: list[Any] | None, prompt: bool) -> None:
    arguments = {"tools": tools, "add_generation_prompt": prompt, "date_string": "01 Jan 2025", "bos_token": "<|begin_of_text|>"}
    texts = [
        render_jinja_template(conversations=[messages], chat_template=t, **arguments)[0][0] for t in (ORIGINAL, serving_text())
    ]
    ours = ChatTemplate("01 Jan 2025").render(messages, add_generation_prompt=prompt, tools=tools)
    assert texts == [ours, ours]


def test_exactly_the_assistants_words_are_learned() -> None:
    tokenizer = AutoTokenizer.from_pretrained(cria_path())
    example = ChatTemplate().encode(tokenizer, DIALOGUE)
    learned = [text for text, supervised in segments(tokenizer, example) if supervised]
    assert learned == ["A baby llama.<|eot_id|>", "A baby horse.<|eot_id|>"]
    assert "".join(text for text, _ in segments(tokenizer, example)) == ChatTemplate().render(DIALOGUE)
    everything = ChatTemplate().encode(tokenizer, DIALOGUE, assistant_only=False)
    assert everything.labels == everything.input_ids == example.input_ids


def test_the_digest_covers_the_date() -> None:
    assert ChatTemplate("01 Jan 2025").digest != ChatTemplate("02 Jan 2025").digest
    assert ChatTemplate().digest == ChatTemplate().digest


def test_cria_was_trained_on_this_format() -> None:
    assert (cria_path() / "chat_template.jinja").read_text() == serving_text()
    sys.path.insert(0, str(ROOT / "pipelines/cria"))
    try:
        module = importlib.util.spec_from_file_location("cria_tokenizer", ROOT / "pipelines/cria/tokenizer.py")
        assert module is not None and module.loader is not None
        loaded = importlib.util.module_from_spec(module)
        module.loader.exec_module(loaded)
    finally:
        sys.path.remove(str(ROOT / "pipelines/cria"))
    plain = [{"role": m["role"], "content": m["content"].strip()} for m in DIALOGUE]
    assert loaded.render(plain) == ChatTemplate().render(plain)


lengths = st.lists(st.integers(1, 50), min_size=1, max_size=60)


@given(lengths)
def test_packs_hold_every_row_once_and_never_too_much(sizes: list[int]) -> None:
    packs = pack_best_fit(sizes, 50)
    assert sorted(index for pack in packs for index in pack) == list(range(len(sizes)))
    assert all(sum(sizes[index] for index in pack) <= 50 for pack in packs)
    # Best fit never leaves two packs that would fit into one.
    loads = sorted(sum(sizes[index] for index in pack) for pack in packs)
    assert len(loads) < 2 or loads[0] + loads[1] > 50


@given(lengths, st.integers(50, 200), st.booleans(), st.sampled_from([0.5, 1.0, 2.0]), st.integers(1, 5), st.integers(50, 120))
def test_steps_are_the_same_for_any_number_of_workers(
    sizes: list[int], budget: int, packing: bool, epochs: float, world: int, micro: int
) -> None:
    steps = plan_steps(sizes, tokens_per_step=budget, max_length=50, packing=packing, seed=3, epochs=epochs)
    assert steps == plan_steps(sizes, tokens_per_step=budget, max_length=50, packing=packing, seed=3, epochs=epochs)
    seen = sorted(index for step in steps for pack in step for index in pack)
    if epochs >= 1:
        assert seen == sorted(list(range(len(sizes))) * int(epochs))
    for step in steps:
        assert 0 < sum(sizes[index] for pack in step for index in pack) <= budget
        shares = [shard(step, sizes, rank=rank, world_size=world, micro_batch_tokens=micro) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1
        assert sorted(pack for share in shares for batch in share for pack in batch) == sorted(step)
        for share in shares:
            for batch in share:
                assert sum(sizes[index] for pack in batch for index in pack) <= micro


def test_a_packed_batch_has_the_loss_of_its_rows_alone() -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(cria_path(), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(10, 2000, (n,), generator=generator).tolist() for n in (7, 19, 30, 11)]
    examples = [Example(row, [-100] * 3 + row[3:]) for row in rows]

    def nats(batch: dict[str, torch.Tensor]) -> float:
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        return float(
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
        )

    alone = sum(nats(collate([[index]], examples)) for index in range(4))
    assert nats(collate([[0, 2], [1, 3]], examples)) == pytest.approx(alone, rel=1e-5)
    assert nats(collate([], examples)) == 0
    assert supervised([[0, 2], [1, 3]], examples) == sum(len(row) - 3 for row in rows)
