"""Text as it comes: whole characters, nothing lost, stop strings found wherever tokens end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from altiplano.models.cria import cria_path
from altiplano.serve.detokenize import TextStream

TOKENIZER = Tokenizer.from_file(str(cria_path() / "tokenizer.json"))


@given(st.text(st.characters(codec="utf-8"), max_size=40))
def test_pieces_add_up_to_the_text(text: str) -> None:
    stream = TextStream(TOKENIZER, [])
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    shown = "".join(stream.push(token) for token in ids) + stream.finish()
    assert shown == TOKENIZER.decode(ids) == stream.text


@pytest.mark.parametrize("text", ["naïve café", "日本語のテキスト", "🦙 llama 🦙", "a\n\nb  c"])
def test_no_half_character_is_ever_shown(text: str) -> None:
    stream = TextStream(TOKENIZER, [])
    for token in TOKENIZER.encode(text, add_special_tokens=False).ids:
        assert "\ufffd" not in stream.push(token)
    assert stream.text + stream.finish() == text


@given(st.text("ab", min_size=1, max_size=30), st.text("ab", min_size=1, max_size=4))
def test_a_stop_string_cuts_exactly_where_it_begins(text: str, stop: str) -> None:
    stream = TextStream(TOKENIZER, [stop])
    shown = ""
    for token in TOKENIZER.encode(text, add_special_tokens=False).ids:
        shown += stream.push(token)
        if stream.stopped:
            break
    shown += stream.finish()
    assert shown == text.split(stop)[0]
    assert stream.stopped == (stop in text)
