"""Who is answered by which arm: in proportion to the weights, and the same tomorrow."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from altiplano.serve.arms import Arms, sticky_key

salts = st.text(min_size=8, max_size=20)
weights = st.dictionaries(st.sampled_from(["champion", "challenger", "third"]), st.integers(0, 100), min_size=1).filter(
    lambda found: any(found.values())
)
KEYS = [f"session:{i}" for i in range(4000)]


def shares(arms: Arms) -> dict[str, float]:
    found = [arms.assign(key) for key in KEYS]
    return {arm: found.count(arm) / len(KEYS) for arm in arms.weights}


@settings(max_examples=25, deadline=None)
@given(salts, weights)
def test_arms_get_their_shares(salt: str, wanted: dict[str, int]) -> None:
    arms = Arms.of({"salt": salt, "weights": wanted})
    for arm, share in shares(arms).items():
        expected = arms.share(arm)
        # Five standard deviations: hypothesis looks for the worst salt.
        assert abs(share - expected) <= 5 * math.sqrt(expected * (1 - expected) / len(KEYS)) + 1e-9


@settings(max_examples=25, deadline=None)
@given(salts, st.integers(0, 100), st.integers(0, 100))
def test_only_the_share_that_moves_changes_its_arm(salt: str, before: int, after: int) -> None:
    one, two = (Arms.of({"salt": salt, "weights": {"champion": 100 - w, "challenger": w}}) for w in (before, after))
    moved = [(one.assign(key), two.assign(key)) for key in KEYS]
    changes = {(a, b) for a, b in moved if a != b}
    assert changes <= {("champion", "challenger") if after > before else ("challenger", "champion")}
    expected = abs(after - before) / 100
    changed = sum(a != b for a, b in moved) / len(KEYS)
    assert abs(changed - expected) <= 5 * math.sqrt(expected * (1 - expected) / len(KEYS)) + 1e-9


@settings(max_examples=25, deadline=None)
@given(salts, weights, st.sampled_from(["champion", "challenger", "third"]), st.integers(1, 50))
def test_a_weight_that_rises_draws_keys_to_its_arm_only(salt: str, wanted: dict[str, int], arm: str, more: int) -> None:
    grown = wanted | {arm: wanted.get(arm, 0) + more}
    one, two = Arms.of({"salt": salt, "weights": wanted}), Arms.of({"salt": salt, "weights": grown})
    for key in KEYS[:500]:
        assert two.assign(key) in (one.assign(key), arm)


@settings(max_examples=25, deadline=None)
@given(salts, weights.filter(lambda found: "challenger" in found))
def test_where_an_arm_is_answered_changes_nobodys_arm(salt: str, wanted: dict[str, int]) -> None:
    here = Arms.of({"salt": salt, "weights": wanted})
    apart = Arms.of({"salt": salt, "weights": wanted, "elsewhere": {"challenger": "altiplano-2"}})
    there = Arms.of({"salt": salt, "weights": wanted, "only": "challenger"})
    for key in KEYS[:500]:
        assert apart.assign(key) == here.assign(key)
        assert there.assign(key) == "challenger"
    assert there.test_id == here.test_id and {arm: there.share(arm) for arm in wanted} == {arm: here.share(arm) for arm in wanted}
    assert apart.divided or not wanted["challenger"], "answers from memory would be the champion's"


def test_the_order_and_the_unit_of_weights_do_not_matter_and_the_salt_does() -> None:
    one = Arms.of({"salt": "a-salt-of-a-test", "weights": {"champion": 95, "challenger": 5}})
    two = Arms.of({"salt": "a-salt-of-a-test", "weights": {"challenger": 0.05, "champion": 0.95}})
    assert [one.assign(key) for key in KEYS] == [two.assign(key) for key in KEYS]
    other = Arms.of({"salt": "another salt here", "weights": {"champion": 95, "challenger": 5}})
    assert [one.assign(key) for key in KEYS] != [other.assign(key) for key in KEYS]
    assert one.test_id != other.test_id and "a-salt" not in one.test_id


def test_what_a_request_sticks_to() -> None:
    assert sticky_key("s", "u", "k", "r") == "session:s"
    assert sticky_key(None, "u", "k", "r") == "user:u"
    assert sticky_key("", None, "k", "r") == "key:k"
    assert sticky_key(None, None, None, "r") == "request:r"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"weights": {"a": 1}}, "salt"),
        ({"salt": "short", "weights": {"a": 1}}, "salt"),
        ({"salt": "long enough", "weights": {}}, "1 to 8 arms"),
        ({"salt": "long enough", "weights": {"a": 0, "b": 0}}, "all weights are 0"),
        ({"salt": "long enough", "weights": {"a": -1}}, "weight of 'a'"),
        ({"salt": "long enough", "weights": {"a": math.inf}}, "weight of 'a'"),
        ({"salt": "long enough", "weights": {"a": math.nan}}, "weight of 'a'"),
        ({"salt": "long enough", "weights": {"a": True}}, "weight of 'a'"),
        ({"salt": "long enough", "weights": {"A b": 1}}, "lower-case"),
        ({"salt": "long enough", "weights": {"a": 1}, "models": "champion"}, "list of model names"),
        ({"salt": "long enough", "weights": {"a": 1}, "sticky": True}, "unknown keys"),
    ],
)
def test_wrong_settings_are_refused_with_what_to_change(values: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Arms.of(values)
