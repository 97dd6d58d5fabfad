"""Adapters of a running endpoint: a name can get other weights, what is refused leaves nothing behind."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from altiplano import spec
from altiplano.models.manifest import ManifestError, manifest_digest, verify_manifest
from altiplano.serve.adapters import name_of
from altiplano.serve.governance import Governance
from altiplano.serve.response_cache import ResponseCache

from .conftest import Server, make_adapter, settings

ASK: dict[str, Any] = {"model": "champion", "prompt": "A note", "max_tokens": 8, "temperature": 0, "ignore_eos": True}


class Changing(Server):
    """An endpoint with a response cache whose champion changes."""

    def configure(self, **adapters: Path) -> None:
        names = {name.replace("_", "-"): str(path) for name, path in adapters.items()}
        self.run(self.generator.reconfigure({"adapters": names, "aliases": {"champion": next(iter(names))}}))

    def ask(self, **more: Any) -> str:
        answer = httpx.post(f"{self.url}/v1/completions", json=ASK | more, timeout=60)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    def loaded(self) -> list[str]:
        """Names in the engine."""
        return [name_of(loaded) for loaded in self.generator.client.adapters]


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("second"), seed=2)


@pytest.fixture(scope="module")
def server(adapter: Path) -> Iterator[Changing]:
    governance = Governance.of(spec.Serve(max_num_seqs=16))
    governance.cache = ResponseCache(1 << 20)
    made = Changing(settings(adapter), governance)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def first(server: Changing, adapter: Path) -> None:
    server.configure(orders_1=adapter)


def test_other_files_under_the_same_name_answer_at_once(server: Changing, adapter: Path, second: Path) -> None:
    before = server.ask()
    server.configure(orders_1=second)
    after = server.ask()
    assert after != before, "neither the engine nor the response cache answers with the old words"
    server.configure(orders_2=second)
    assert server.ask() == after and server.loaded() == ["orders-2"]
    server.configure(orders_1=adapter)
    assert server.ask() == before


def test_other_files_in_the_same_directory_too(server: Changing, adapter: Path, second: Path, tmp_path: Path) -> None:
    place = tmp_path / "served"
    words = []
    for source in (adapter, second):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(source, place)
        server.configure(orders_1=place)
        words.append(server.ask())
    assert words[0] != words[1] and server.loaded() == ["orders-1"]


def test_an_answer_ends_with_the_weights_that_it_began_with(server: Changing, second: Path) -> None:
    body = ASK | {"stream": True, "max_tokens": 300, "seed": 3, "temperature": 1}
    whole = server.ask(**(body | {"stream": False}))
    with ExitStack() as asked:
        with server.unending():
            stream = asked.enter_context(httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60))
            lines = stream.iter_lines()
            events = [next(lines)]
            server.configure(orders_1=second)
            assert server.loaded() == ["orders-1", "orders-1"], "both until the answer has ended"
        events += [line for line in lines if line]
    assert events.pop() == "data: [DONE]"
    assert "".join(json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events) == whole
    assert server.ask(**(body | {"stream": False})) != whole
    assert server.loaded() == ["orders-1"]


@pytest.mark.parametrize("fault", ["damaged", "missing", "of another base"])
def test_a_change_with_one_bad_adapter_leaves_nothing_behind(server: Changing, second: Path, tmp_path: Path, fault: str) -> None:
    words, bad = server.ask(), tmp_path / "bad"
    if fault != "missing":
        shutil.copytree(second, bad)
    if fault == "damaged":
        (bad / "adapter_model.safetensors").write_bytes(b"damaged")
    if fault == "of another base":
        make_foreign(bad)
    with pytest.raises(ValueError, match=str(bad)):
        server.configure(orders_2=second, orders_3=bad)
    assert server.loaded() == ["orders-1"] and server.ask() == words
    assert "orders-2" not in httpx.get(f"{server.url}/v1/models", timeout=60).text


def make_foreign(directory: Path) -> None:
    """Make an adapter's tensors those of another model, with a good manifest."""
    from safetensors.torch import load_file, save_file

    from altiplano.models.manifest import write_manifest

    path = directory / "adapter_model.safetensors"
    save_file({name: tensor[:, :-1].contiguous() for name, tensor in load_file(path).items()}, path)
    write_manifest(directory)


@pytest.mark.parametrize("name", ["base", "cria"])
@pytest.mark.parametrize("kind", ["adapters", "aliases"])
def test_the_names_of_the_base_are_reserved(server: Changing, adapter: Path, kind: str, name: str) -> None:
    config = {"adapters": {"orders-1": str(adapter)}, "aliases": {"champion": "orders-1"}}
    target = str(adapter) if kind == "adapters" else "orders-1"
    with pytest.raises(ValueError, match=f"{kind} names '{name}'"):
        server.run(server.generator.reconfigure(config | {kind: config[kind] | {name: target}}))
    assert server.loaded() == ["orders-1"]


@pytest.mark.parametrize("config", [{"adapters": ["x"]}, {"adapters": {"a": 1}}, {"aliases": "champion"}])
def test_nonsense_is_refused_by_name(server: Changing, config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(config))):
        server.run(server.generator.reconfigure(config))


def test_a_manifest_has_one_digest(adapter: Path, tmp_path: Path) -> None:
    assert manifest_digest(adapter) == verify_manifest(adapter)
    with pytest.raises(ManifestError, match="has no"):
        manifest_digest(tmp_path)
