"""Events come whole out of bytes in any pieces."""

from hypothesis import given, settings
from hypothesis import strategies as st

from altiplano.client.sse import EventParser

STREAM = ': ping\n\ndata: {"a": "é"}\n\nevent: x\nid: 3\ndata:one\ndata: two\n\n\n\ndata: [DONE]\n\n'.encode()
EVENTS = ['{"a": "é"}'.encode(), b"one\ntwo", b"[DONE]"]


@settings(deadline=None)
@given(st.lists(st.integers(0, len(STREAM) + 6), max_size=12), st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_any_cut_and_any_line_end_give_the_same_events(cuts: list[int], line_end: bytes) -> None:
    # A comment afterwards: a lone CR at the end may be half of a CRLF until the next byte has come.
    data = STREAM.replace(b"\n", line_end) + b":"
    parser, found, start = EventParser(), list[bytes](), 0
    for cut in [*sorted(cuts), len(data)]:
        found += parser.push(data[start:cut])
        start = max(start, cut)
    assert found == EVENTS
