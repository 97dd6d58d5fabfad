"""`altiplano generate` against the endpoint."""

import json
import subprocess
import sys

from openai import OpenAI

from ..serve.conftest import Server
from .conftest import Scripted


def generate(*arguments: str, stdin: str | None = None) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "altiplano.cli", "generate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, input=stdin)


def test_a_text_is_continued_as_openais_client_would(server: Server) -> None:
    url = f"{server.url}/v1"
    with OpenAI(base_url=url, api_key="none") as client:
        wanted = client.completions.create(model="cria", prompt="A note", max_tokens=8, temperature=0).choices[0].text
    options = ["--url", url, "--model", "cria", "--max-tokens", "8"]
    assert generate("A note", *options).stdout == wanted + "\n"
    assert generate(*options, stdin="A note").stdout == wanted + "\n"
    whole = json.loads(generate("A note", *options, "-p", "n=2", "-p", "logprobs=1", "-o", "json").stdout)
    assert [choice["text"] for choice in whole["choices"]] == [wanted, wanted]
    assert whole["choices"][0]["logprobs"]["tokens"]


def test_what_is_wrong_is_said_once_with_an_exit_code(server: Server, scripted: Scripted) -> None:
    url = f"{server.url}/v1"
    for arguments, code, words in (
        (["x", "--url", url, "--model", "gpt-9"], 2, "orders-1"),
        (["x", "--url", url, "-p", "top_p=7"], 2, "top_p"),
        (["x", "--url", url, "-p", "oops"], 2, "KEY=VALUE"),
        (["x", "--url", "localhost"], 2, "no address"),
        (["x", "--url", "http://127.0.0.1:9/v1"], 4, "altiplano run"),
        (["", "--url", url], 2, "empty"),
    ):
        done = generate(*arguments)
        assert (done.returncode, words in done.stderr) == (code, True), done.stderr
        assert "Traceback" not in done.stderr


def test_the_key_comes_from_the_option(scripted: Scripted) -> None:
    generate("x", "--url", scripted.url, "--api-key", "secret", "-o", "json")
    assert scripted.seen[0].headers["authorization"] == "Bearer secret"
    assert scripted.seen[0].body["model"] == "champion"
