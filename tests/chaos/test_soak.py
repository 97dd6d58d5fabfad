"""What the soak calls flat, and what it does not."""

import pytest

from .soak import Sample, grown


def level(memory_mib: float = 1000, files: float = 200, pages: float = 0.4) -> Sample:
    return Sample(memory_mib, files, pages)


def test_noise_around_a_level_is_flat() -> None:
    assert grown([level(1000 + index % 5 * 20, 200 + index % 3 * 10, index % 2 * 0.8) for index in range(40)]) == {}


def test_a_warm_up_does_not_count() -> None:
    assert grown([level(400 + 60 * index, 100 + 10 * index) for index in range(10)] + [level()] * 30) == {}


@pytest.mark.parametrize(
    ("name", "samples"),
    [
        ("memory_mib", [level(memory_mib=1000 + 3 * index) for index in range(40)]),
        ("files", [level(files=200 + index) for index in range(40)]),
        ("pages", [level(pages=0.02 * index) for index in range(40)]),
    ],
)
def test_a_slow_leak_is_named(name: str, samples: list[Sample]) -> None:
    assert list(grown(samples)) == [name]


def test_too_short_a_run_says_so() -> None:
    with pytest.raises(ValueError, match="at least 20 s"):
        grown([level()] * 3)
