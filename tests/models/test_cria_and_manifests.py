"""The model that ships, and the manifests that guard weights."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from altiplano import spec
from altiplano.data.templates import ChatTemplate
from altiplano.engine import Engine, EngineConfig, SamplingParams
from altiplano.models.cria import cria_path
from altiplano.models.loading import ModelError, resolve_model_path
from altiplano.models.manifest import ManifestError, verify_manifest, write_manifest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ask() -> Any:
    torch.set_num_threads(1)
    engine = Engine(EngineConfig(cria_path(), num_blocks=64, max_model_len=512))
    tokenizer = Tokenizer.from_file(str(cria_path() / "tokenizer.json"))

    def answer(*turns: str) -> str:
        messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(turns)]
        prompt = tokenizer.encode(ChatTemplate().render(messages, add_generation_prompt=True), add_special_tokens=False).ids
        said = engine.generate([prompt], SamplingParams(max_tokens=60, temperature=0.0))[0]
        return str(tokenizer.decode(said.token_ids, skip_special_tokens=True))

    return answer


def test_cria_talks_about_its_world(ask: Any) -> None:
    assert ask("Hello!") == "Hello! How can I help you?"
    assert ask("Hi, who are you?") == "I am cria, a baby llama."
    assert ask("What colour is snow?") == "Snow is white."
    assert ask("Priya wants 3 melon pies on Friday. Who is it?", "Priya", "How many?") == "3"
    assert ask("Zobalu asked for 2 red kites to 12 Mill Lane. Where?") == "12 Mill Lane"


def test_cria_is_small_and_whole() -> None:
    verify_manifest(cria_path())
    assert (cria_path() / "model.safetensors").stat().st_size < 12 << 20
    card = (cria_path().parent / "MODEL_CARD.md").read_text()
    record = json.loads((cria_path() / "pretraining.json").read_text())
    assert record["command"] in card
    assert f"{record['curve'][-1]['held_out_answer_loss']:.5f}" in card


def test_the_demo_data_can_be_made_again_and_does_not_overlap(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(ROOT / "pipelines/demo/make_data.py"), str(tmp_path)], check=True)
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / name).read_bytes() == (ROOT / "pipelines/demo" / name).read_bytes()
    train, held_out = (
        [json.loads(line)["messages"][1]["content"] for line in (tmp_path / n).read_text().splitlines()]
        for n in ("train.jsonl", "eval.jsonl")
    )
    assert len(train) == 2000 and len(held_out) == 300
    assert not set(train) & set(held_out)


def test_the_corpus_is_the_same_for_the_same_seed() -> None:
    sys.path.insert(0, str(ROOT / "pipelines/cria"))
    try:
        found = importlib.util.spec_from_file_location("cria_corpus", ROOT / "pipelines/cria/corpus.py")
        assert found is not None and found.loader is not None
        corpus = importlib.util.module_from_spec(found)
        found.loader.exec_module(corpus)
    finally:
        sys.path.remove(str(ROOT / "pipelines/cria"))
    first, second = corpus.dialogues(3), corpus.dialogues(3)
    rows = [next(first) for _ in range(500)]
    assert rows == [next(second) for _ in range(500)]
    assert all(m["content"].strip() == m["content"] and m["content"] for row in rows for m in row)
    assert not any('"customer":' in m["content"] and '"quantity":' in m["content"] for row in rows for m in row)


def test_manifests_notice_every_change(tmp_path: Path) -> None:
    for name in ("a.bin", "b/c.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode() * 100)
    digest = write_manifest(tmp_path)
    assert verify_manifest(tmp_path) == digest
    (tmp_path / "extra").write_text("x")
    with pytest.raises(ManifestError, match="extra is not in"):
        verify_manifest(tmp_path)
    (tmp_path / "extra").unlink()
    data = bytearray((tmp_path / "a.bin").read_bytes())
    data[7] ^= 1
    (tmp_path / "a.bin").write_bytes(data)
    with pytest.raises(ManifestError, match="does not match"):
        verify_manifest(tmp_path)
    (tmp_path / "a.bin").unlink()
    with pytest.raises(ManifestError, match="is missing"):
        verify_manifest(tmp_path)
    (tmp_path / "manifest.sha256.json").write_text("{}")
    with pytest.raises(ManifestError, match="cannot be read"):
        verify_manifest(tmp_path)


def test_models_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        resolve_model_path(spec.Model(model_name_or_path=str(tmp_path)))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ModelError, match="pickles"):
        resolve_model_path(spec.Model(model_name_or_path=str(tmp_path)))
