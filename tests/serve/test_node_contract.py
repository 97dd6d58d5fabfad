"""The endpoint through OpenAI's own client for Node: tests/serve/node/contract.mjs, each of its tests one of ours."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from .conftest import PATIENCE_S, Server, settings

SUITE = Path(__file__).parent / "node/contract.mjs"
NODE_TOOLS = Path(__file__).parents[2] / ".venv/tools/node"
NAMES = re.findall(r'^test\("(.+)", async', SUITE.read_text(), re.MULTILINE)
VERSION = 20  # the oldest Node that runs the suite


@pytest.fixture(scope="module")
def node() -> str:
    found = shutil.which("node")
    if found is None:
        pytest.skip("no Node.js on this machine")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    if int(version.lstrip("v").split(".")[0]) < VERSION:
        pytest.skip(f"Node.js {version.strip()} is older than {VERSION}")
    if not (NODE_TOOLS / "node_modules/openai").exists():
        pytest.skip("OpenAI's client for Node is not there: `make node-tools` fetches it from npm's registry")
    return found


@pytest.fixture(scope="module")
def server(node: str, adapter: Path) -> Iterator[Server]:
    """With room for what the template says about tools, in cria's small tokens."""
    made = Server(replace(settings(adapter), max_model_len=1536))
    yield made
    made.close()


@pytest.fixture(scope="module")
def outcomes(node: str, server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What Node says of each test, in TAP; beside `ok` the whole output, which says why one is not."""
    folder = tmp_path_factory.mktemp("node")
    # Node looks for packages beside the file that imports them.
    shutil.copy(SUITE, folder)
    (folder / "node_modules").symlink_to(NODE_TOOLS / "node_modules")
    command = [node, "--test-reporter=tap", f"--test-timeout={int(PATIENCE_S * 1000)}", "--test", str(folder / SUITE.name)]
    addresses = {"ENDPOINT": server.url, "ENGINE": str(server.generator.client.pid)}
    done = subprocess.run(command, env=os.environ | addresses, capture_output=True, text=True)
    said = done.stdout + done.stderr
    return {name: "ok" if re.search(rf"^ *ok \d+ - {re.escape(name)}$", said, re.MULTILINE) else said for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_the_node_client(outcomes: dict[str, str], name: str) -> None:
    assert outcomes[name] == "ok", outcomes[name]
