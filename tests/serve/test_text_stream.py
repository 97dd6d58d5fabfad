"""Text as it comes: whole characters, nothing lost, stop strings found wherever tokens end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from altiplano.models.cria import cria_path
from altiplano.serve.detokenize import TextStream, Vocabulary

TOKENIZER = Tokenizer.from_file(str(cria_path() / "tokenizer.json"))
VOCABULARY = Vocabulary(TOKENIZER)


@given(st.text(st.characters(codec="utf-8"), max_size=40))
def test_pieces_add_up_to_the_text(text: str) -> None:
    stream = TextStream(VOCABULARY, [])
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    shown = "".join(stream.push(token) for token in ids) + stream.finish()
    assert shown == TOKENIZER.decode(ids)


@given(st.lists(st.integers(0, TOKENIZER.get_vocab_size() - 1), max_size=30))
def test_whatever_a_model_draws_is_shown_as_the_tokenizer_would(ids: list[int]) -> None:
    stream = TextStream(VOCABULARY, [])
    shown = "".join(stream.push(token) for token in ids) + stream.finish()
    assert shown == TOKENIZER.decode(ids) == VOCABULARY.text(ids)


@given(
    st.lists(st.integers(0, TOKENIZER.get_vocab_size() - 1), max_size=30), st.lists(st.text(min_size=1, max_size=3), max_size=3)
)
def test_stop_strings_cut_random_tokens_as_they_cut_the_whole_text(ids: list[int], stops: list[str]) -> None:
    stops += [VOCABULARY.text(ids)[3:5]] * (len(VOCABULARY.text(ids)) > 4)
    stream, shown = TextStream(VOCABULARY, stops), ""
    for token in ids:
        shown += stream.push(token)
        if stream.stopped:
            break
    shown += stream.finish()
    whole = VOCABULARY.text(ids)
    # The stop that is complete first ends the answer; of two complete at once, the one that begins first.
    ends = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    assert stream.stopped == bool(ends)
    assert whole.startswith(shown) and not any(stop in shown for stop in stops)
    if ends:
        assert len(shown) <= min(ends)[1]
    else:
        assert shown == whole


@pytest.mark.parametrize("text", ["naïve café", "日本語のテキスト", "🦙 llama 🦙", "a\n\nb  c"])
def test_no_half_character_is_ever_shown(text: str) -> None:
    stream = TextStream(VOCABULARY, [])
    shown = [stream.push(token) for token in TOKENIZER.encode(text, add_special_tokens=False).ids]
    assert not any("\ufffd" in piece for piece in shown)
    assert "".join(shown) + stream.finish() == text


@given(st.text("ab", min_size=1, max_size=30), st.text("ab", min_size=1, max_size=4))
def test_a_stop_string_cuts_exactly_where_it_begins(text: str, stop: str) -> None:
    stream = TextStream(VOCABULARY, [stop])
    shown = ""
    for token in TOKENIZER.encode(text, add_special_tokens=False).ids:
        shown += stream.push(token)
        if stream.stopped:
            break
    shown += stream.finish()
    assert shown == text.split(stop)[0]
    assert stream.stopped == (stop in text)
