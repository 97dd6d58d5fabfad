"""`altiplano chat` against the endpoint."""

import subprocess
import sys
from pathlib import Path

from altiplano import spec
from altiplano.serve.governance import Governance
from altiplano.serve.keys import KeyFile

from ..serve.conftest import Server, settings

NOTE = "Priya wants 3 melon pies at 14 Elm Street on Friday. Where?"


def chat(*arguments: str, stdin: str | None = None) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "altiplano.cli", "chat", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, input=stdin)


def test_one_question_and_a_conversation(server: Server) -> None:
    options = ["--url", f"{server.url}/v1", "--model", "cria", "--max-tokens", "20"]
    assert chat(NOTE, *options).stdout == "14 Elm Street\n"
    assert chat("Repeat: kite 4", *options).stdout == "kite 4\n"
    talk = chat(*options, "-p", 'stop=[" Street"]', stdin=f"{NOTE}\nRepeat: kite 4\n")
    assert talk.returncode == 0 and "Talking to cria" in talk.stderr
    first, second, _ = talk.stdout.removeprefix("> ").split("\n> ")
    assert first == "14 Elm"
    # The second answer knows the first turn: alone, the model would have said something else.
    assert second and second != "kite 4"


def test_an_endpoint_with_keys(adapter: Path, tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    _, text = keys.create("me")
    served = Server(settings(adapter), Governance.of(spec.Serve(host="0.0.0.0", api_keys_file=str(keys.path))))
    try:
        options = [NOTE, "--url", f"{served.url}/v1", "--model", "cria"]
        refused = chat(*options)
        assert refused.returncode == 2 and "API key" in refused.stderr
        assert chat(*options, "--api-key", text).stdout == "14 Elm Street\n"
    finally:
        served.close()
