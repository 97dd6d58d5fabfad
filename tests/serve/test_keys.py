"""API keys: made, used, revoked and expired, by people and by processes at the same time."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from altiplano.cli.app import app
from altiplano.serve.keys import REFRESH_S, KeyFile, KeyFileError, KeyRefusedError, KeyRing, Scope


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def test_a_key_opens_and_its_text_is_nowhere(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    key, text = file.create("team", requests_per_minute=7)
    assert KeyRing(file).check(text) == key == file.read()[0]
    secret = text.split("-", 2)[2]
    assert len(secret) >= 43 and secret not in file.path.read_text()
    assert file.path.stat().st_mode & 0o777 == 0o600


def test_wrong_keys_are_all_refused_in_the_same_words(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    key, text = file.create("team")
    ring = KeyRing(file)
    said = set()
    for wrong in ("", "x", text[:-1], text + "x", f"alt-{key.id}-", text.replace(key.id, "00000000"), "alt-\udcff-x", key.sha256):
        with pytest.raises(KeyRefusedError) as caught:
            ring.check(wrong)
        said.add(str(caught.value))
    assert len(said) == 1


def test_revoking_and_expiring_take_effect_while_serving(tmp_path: Path) -> None:
    clock = Clock()
    file = KeyFile(tmp_path / "keys.json", clock)
    short, short_text = file.create("short", expires_in_s=100)
    gone, gone_text = file.create("gone")
    ring = KeyRing(file, clock, clock)
    assert ring.check(gone_text).id == gone.id
    file.revoke(gone.id)
    clock.now += REFRESH_S
    with pytest.raises(KeyRefusedError, match="revoked"):
        ring.check(gone_text)
    clock.now += 98
    assert ring.check(short_text).id == short.id
    clock.now += 1
    with pytest.raises(KeyRefusedError, match="expired"):
        ring.check(short_text)
    assert [key.state(clock()) for key in file.read()] == ["expired", "revoked"]


def test_a_new_key_works_at_once(tmp_path: Path) -> None:
    clock = Clock()
    file = KeyFile(tmp_path / "keys.json", clock)
    file.create("first")
    ring = KeyRing(file, clock, clock)
    second, text = file.create("second")
    assert ring.check(text) == second


def test_a_damaged_or_removed_file_keeps_the_keys_that_were_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    file = KeyFile(tmp_path / "keys.json", clock)
    key, text = file.create("team")
    ring = KeyRing(file, clock, clock)
    file.path.write_text("{")
    clock.now += 2
    assert ring.check(text) == key
    file.path.unlink()
    clock.now += 2
    assert ring.check(text) == key
    assert [record.message.split(":")[0] for record in caplog.records] == ["the keys stay as they were"] * 2


def test_serving_does_not_start_without_a_usable_key_file(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    with pytest.raises(KeyFileError, match="altiplano keys create"):
        KeyRing(file)
    file.path.write_text('{"keys": [{"id": "x"}]}')
    with pytest.raises(KeyFileError, match="not a key file"):
        KeyRing(file)


def test_a_file_that_cannot_be_changed_says_so(tmp_path: Path) -> None:
    (tmp_path / "mounted").write_text("not a directory")
    with pytest.raises(KeyFileError, match="change the Secret"):
        KeyFile(tmp_path / "mounted" / "keys.json").create("team")


def test_writers_take_turns(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda n: KeyFile(tmp_path / "keys.json").create(f"key {n}")[0], range(40)))
    found = KeyFile(tmp_path / "keys.json").read()
    assert {key.id for key in found} == {key.id for key in made} and len(found) == 40
    assert {path.name for path in tmp_path.iterdir()} == {"keys.json", ".keys.json.lock"}


def test_a_lent_key_opens_for_a_while_and_leaves_nothing_behind(tmp_path: Path) -> None:
    clock = Clock()
    file = KeyFile(tmp_path / "keys.json", clock)
    mine, _ = file.create("mine")
    ring = KeyRing(file, clock, clock)
    with file.lend("check") as text:
        assert ring.check(text).name == "check"
    clock.now += REFRESH_S
    with pytest.raises(KeyRefusedError):
        ring.check(text)
    assert file.read() == (mine,)


def test_who_watches_may_not_ask_and_who_asks_may_not_watch() -> None:
    reach = {scope.value: [other.value for other in Scope if scope.includes(other)] for scope in Scope}
    assert reach == {
        "public": ["public"],
        "metrics": ["public", "metrics"],
        "user": ["public", "user"],
        "admin": ["public", "metrics", "user", "admin"],
    }


def test_the_commands(tmp_path: Path) -> None:
    def run(*words: str) -> str:
        result = CliRunner().invoke(app, ["keys", *words, "--file", str(tmp_path / "keys.json")], catch_exceptions=False)
        assert result.exit_code == 0
        return result.stdout

    text = run("create", "team", "--expires", "12h", "--tokens-per-minute", "600").strip()
    made = json.loads(run("create", "ops", "--scope", "admin", "-o", "json"))
    ring = KeyRing(KeyFile(tmp_path / "keys.json"))
    assert ring.check(text).tokens_per_minute == 600
    assert ring.check(made["key"]).scope is Scope.admin
    assert json.loads(run("revoke", made["id"], "-o", "json"))["state"] == "revoked"
    listed = json.loads(run("list", "-o", "json"))
    assert [(key["name"], key["state"]) for key in listed] == [("team", "active"), ("ops", "revoked")]
    assert listed[0]["expires"] - listed[0]["created"] == 12 * 3600
    assert "600" in run("list") and text not in run("list")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["create", "x", "--expires", "3y"], "for example 30d"),
        (["create", "x", "--scope", "public"], "user, metrics or admin"),
        (["revoke", "nobody"], "altiplano keys list"),
    ],
)
def test_the_commands_say_what_is_wrong(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(app, ["keys", *words, "--file", str(tmp_path / "keys.json")], catch_exceptions=False)
