"""Llama 3.2's chat template, pinned: the same bytes in training, evaluation and serving.

The original writes today's date into every prompt, so data prepared on Monday differs from prompts served on Tuesday. Here
the date is an argument, and one digest over text, date and stop tokens travels with every adapter.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

Message = dict[str, Any]
IGNORED = -100
STOP_TOKENS = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")


@dataclass(frozen=True)
class Example:
    """One row as tokens: `labels` is `input_ids` where the model learns, -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]


@cache
def training_text() -> str:
    """The template with generation marks."""
    return (Path(__file__).parent / "chat_templates" / "llama3_2_training.jinja").read_text()


@cache
def serving_text() -> str:
    """The template without generation marks: what goes into a tokenizer's directory."""
    return re.sub(r"\{%- (end)?generation -%\}\n\s*", "", training_text())


@dataclass(frozen=True)
class ChatTemplate:
    """Messages to text and tokens. Roles: system, user, assistant, tool."""

    date_string: str = "26 Jul 2024"
    bos_token: str = "<|begin_of_text|>"

    @property
    def digest(self) -> str:
        """sha256 over everything that decides a prompt's bytes and its end."""
        parts = (training_text(), self.date_string, self.bos_token, *STOP_TOKENS)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False, tools: list[Any] | None = None) -> str:
        """The text of a dialogue.

        Raises:
            jinja2.TemplateError: messages that the format cannot express.
        """
        return self._render(messages, add_generation_prompt, tools)[0]

    def encode(self, tokenizer: Any, messages: Sequence[Message], *, assistant_only: bool = True) -> Example:
        """Tokens of a whole dialogue; learned are the assistant's words and the token that ends them, or everything."""
        text, spans = self._render(messages, False, None)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids: list[int] = encoded["input_ids"]
        if not assistant_only:
            return Example(ids, list(ids))
        labels = [IGNORED] * len(ids)
        span = iter(spans)
        start, end = next(span, (len(text), len(text)))
        for position, (left, _) in enumerate(encoded["offset_mapping"]):
            while left >= end:
                start, end = next(span, (len(text), len(text) + 1))
            if start <= left:
                labels[position] = ids[position]
        return Example(ids, labels)

    def encode_prompt(self, tokenizer: Any, messages: Sequence[Message], tools: list[Any] | None = None) -> list[int]:
        """Tokens up to where the assistant's next words begin."""
        text = self.render(messages, add_generation_prompt=True, tools=tools)
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _render(self, messages: Sequence[Message], prompt: bool, tools: list[Any] | None) -> tuple[str, list[tuple[int, int]]]:
        rendered, spans = render_jinja_template(
            conversations=[list(messages)],
            chat_template=training_text(),
            tools=tools,
            return_assistant_tokens_mask=True,
            add_generation_prompt=prompt,
            date_string=self.date_string,
            bos_token=self.bos_token,
        )
        return rendered[0], [tuple(span) for span in spans[0]]


def encode_text(tokenizer: Any, text: str, bos_token_id: int, eos_token_id: int) -> Example:
    """Plain text between the model's begin and end tokens; everything is learned but the first token."""
    ids = [bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"], eos_token_id]
    return Example(ids, [IGNORED, *ids[1:]])
