"""A pipeline file as users write it: values with their origin, and every mistake with its place."""

from pathlib import Path

import pytest

from altiplano.engine import EngineConfig
from altiplano.pipeline.stages.deploy import serve_settings
from altiplano.serve.engine_client import engine_settings
from altiplano.spec.errors import SpecError
from altiplano.spec.loader import load, render, resolve_overrides
from altiplano.spec.schema import docs_page, json_schema

ROOT = Path(__file__).parents[2]
GOOD = """\
data:
  datasets: [{path: train.jsonl}]
  eval_datasets:
    - path: eval.jsonl
training:
  learning_rate: 2e-4
run: {name: test}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "pipeline.yaml"
    path.write_text(text)
    return path


def test_values_know_where_they_come_from(tmp_path: Path) -> None:
    resolved = load(write(tmp_path, GOOD), ["lora.r=8", "training.eval_steps=7"])
    assert resolved.pipeline.training.learning_rate == 2e-4
    assert resolved.pipeline.data.datasets[0].path == str(tmp_path / "train.jsonl")
    lines = list(render(resolved))
    assert "training.learning_rate: 0.0002  # line 6" in lines
    assert "lora.r: 8  # command line" in lines
    assert "lora.lora_alpha: 32.0  # default" in lines
    assert resolved.digest != load(write(tmp_path, GOOD)).digest
    assert resolved.digest == load(write(tmp_path, GOOD), ["lora.r=8", "training.eval_steps=7"]).digest


@pytest.mark.parametrize(
    ("change", "place", "words"),
    [
        (("training:", "trainig:"), ":5: trainig", "did you mean training?"),
        (("learning_rate: 2e-4", "lerning_rate: 2e-4"), ":6: training.lerning_rate", "did you mean learning_rate?"),
        (("learning_rate: 2e-4", "lora_alpha: 4"), ":6: training.lora_alpha", "did you mean lora.lora_alpha?"),
        (("2e-4", "fast"), ":6: training.learning_rate", "'fast'"),
        (("2e-4", ".nan"), ":6: training.learning_rate", "finite"),
        (("name: test", "name: Bad Name"), ":7: run.name", "'Bad Name'"),
        (("run: {name: test}", "run: {}"), ":7: run.name", "is required"),
        (("run: {name: test}", "run: {name: test}\ntraining: {}"), ":8: training", "twice"),
        (("data:", "data: ["), ":3", "not valid YAML"),
        (("run: {name: test}", "run: {name: test}\ngate: {primary: bleu}"), "", "evaluate.tasks"),
        (("2e-4", "2e-4\n  tokens_per_step: 100"), "", "raise tokens_per_step"),
        (("run: {name: test}", "run: {name: test}\nlora: {init_lora_weights: pissa}"), ":8: lora.init_lora_weights", "pissa"),
        (("run: {name: test}", "run: {name: test}\nserve: {engine: vllm}"), "", "serve.engine vllm needs a GPU"),
        (
            ("run: {name: test}", "run: {name: test}\nscaling: {use_gpu: true}\nserve: {engine: vllm, quantization: int4}"),
            "",
            "serve.engine vllm has no serve.quantization int4: use none or w8a8-fp8",
        ),
        (("run: {name: test}", "run: {name: test}\nserve: {speculative_model: x}"), "", "set serve.num_speculative_tokens"),
        (("run: {name: test}", "run: {name: test}\nserve: {itl_target_ms: 0}"), ":8: serve.itl_target_ms", "greater than 0"),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path: Path, change: tuple[str, str], place: str, words: str) -> None:
    path = write(tmp_path, GOOD.replace(*change))
    with pytest.raises(SpecError) as caught:
        load(path)
    assert f"{path}{place}" in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("gpu", "serve", "words"),
    [
        (True, "num_speculative_tokens: 16", "is 16, and a GPU checks at most 15 guesses"),
        (True, "deterministic: true, quantization: w8a8-fp8", "serve.deterministic is not for serve.quantization w8a8-fp8"),
        (True, "num_speculative_tokens: 4, speculative_quantization: int4", "has no serve.speculative_model"),
        (True, "quantization: int4, block_size: 24", "is 24, and quantized weights need a multiple of 16"),
        (True, "engine: vllm, num_speculative_tokens: 4", "are not for serve.engine vllm"),
        (True, "engine: vllm, itl_target_ms: 20", "are not for serve.engine vllm"),
        (True, "engine: vllm, deterministic: true", "are not for serve.engine vllm"),
        (True, "engine: vllm, block_size: 48", "serve.engine vllm has no serve.block_size 48"),
        (True, "engine: vllm}\nlora: {use_dora: true", "does not run what lora.use_dora makes"),
        (False, "num_speculative_tokens: 4, speculative_model: x, speculative_quantization: int8", "need a GPU"),
        (False, "quantization: w8a8-int8", "need a GPU"),
        (False, "kv_cache_dtype: fp8", "need a GPU"),
    ],
)
def test_what_the_engine_would_refuse_is_refused_before_the_training(tmp_path: Path, gpu: bool, serve: str, words: str) -> None:
    text = GOOD + f"scaling: {{use_gpu: {str(gpu).lower()}}}\nserve: {{{serve}}}\n"
    with pytest.raises(SpecError, match=words):
        load(write(tmp_path, text))


@pytest.mark.parametrize(
    ("gpu", "serve"),
    [
        (True, "num_speculative_tokens: 15, itl_target_ms: 20, deterministic: true, quantization: int4, kv_cache_dtype: fp8"),
        (True, "num_speculative_tokens: 4, speculative_model: x, speculative_quantization: int4, quantization: w8a8-fp8"),
        (True, "engine: vllm, kv_cache_dtype: int8, quantization: w8a8-fp8"),
        (False, "num_speculative_tokens: 32, speculative_model: x, itl_target_ms: 20, deterministic: true"),
    ],
)
def test_modes_of_the_engine_may_be_combined(tmp_path: Path, gpu: bool, serve: str) -> None:
    text = GOOD + f"scaling: {{use_gpu: {str(gpu).lower()}}}\nserve: {{{serve}}}\n"
    read = load(write(tmp_path, text)).pipeline
    asked = engine_settings(serve_settings(read, "/model", "orders", "/adapter", None))
    engine = EngineConfig(**{name: value for name, value in asked.items() if name not in ("engine", "threads")})
    for name in ("num_speculative_tokens", "speculative_model", "itl_target_ms", "deterministic", "quantization"):
        assert getattr(engine, name) == getattr(read.serve, name)
    assert engine.speculative_quantization == read.serve.speculative_quantization


def test_all_mistakes_come_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("2e-4", "-1").replace("run: {name: test}", "run: {name: test, colour: red}")
    with pytest.raises(SpecError) as caught:
        load(write(tmp_path, text), ["lora.r=0"])
    assert {problem.key for problem in caught.value.problems} == {"training.learning_rate", "run.colour", "lora.r"}
    assert "command line: lora.r" in str(caught.value)


def test_files_that_are_no_pipeline_files(tmp_path: Path) -> None:
    for text, words in (
        ("", "is empty"),
        ("- a\n- b\n", "mapping of sections"),
        ("!!python/object:os.system {}", "not valid YAML"),
    ):
        with pytest.raises(SpecError, match=words):
            load(write(tmp_path, text))
    with pytest.raises(SpecError, match="cannot be read"):
        load(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="UTF-8"):
        load(tmp_path / "binary.yaml")
    with pytest.raises(SpecError, match="key=value"):
        load(write(tmp_path, GOOD), ["nonsense"])


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ("{data.max_length: {choice: [1]}}", "not a setting that a sweep can vary"),
        ("{lora.r: {normal: [1, 2]}}", "no distribution"),
        ("{lora.r: {choice: []}}", "list of values"),
        ("{training.learning_rate: {loguniform: [0, 1]}}", "low > 0"),
        ("{training.learning_rate: {uniform: [2, 1]}}", "low < high"),
        ("{training.learning_rate: {uniform: [2, 1], choice: [1]}}", "exactly one"),
        ("{lora.r: {uniform: [4, 32]}}", r"search_space.lora.r: 14\.69.* would be refused"),
        ("{training.learning_rate: {choice: [1.0e-3, fast]}}", "'fast' would be refused"),
        ("{training.learning_rate: {loguniform: [1.0e-3, 7]}}", "7 would be refused"),
    ],
)
def test_search_spaces_are_checked(tmp_path: Path, space: str, words: str) -> None:
    text = GOOD + "tune:\n  scheduler: {max_t: 9, grace_period: 1}\n  search_space: " + space + "\n"
    with pytest.raises(SpecError, match=words):
        load(write(tmp_path, text))


def test_overrides_of_list_items_must_exist(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    assert load(path, ["data.datasets.0.split=small"]).pipeline.data.datasets[0].split == "small"
    for wrong in ("data.datasets.5.path=zz", "data.datasets.x.path=1"):
        with pytest.raises(SpecError, match="is no item of a list of 1"):
            load(path, [wrong])


def test_a_trials_settings_are_checked_like_a_file(tmp_path: Path) -> None:
    pipeline = load(write(tmp_path, GOOD)).pipeline
    assert resolve_overrides(pipeline, {"lora.r": 4, "training.learning_rate": 1e-3}).lora.r == 4
    with pytest.raises(SpecError, match=r"lora\.r"):
        resolve_overrides(pipeline, {"lora.r": -4})


def test_the_docs_page_is_the_generated_one() -> None:
    assert (ROOT / "docs/pipeline-file.md").read_text() == docs_page()


def test_the_schema_names_every_section_and_closes_it() -> None:
    schema = json_schema()
    assert {"model", "lora", "data", "training", "tune", "gate", "serve"} <= set(schema["properties"])
    assert schema["additionalProperties"] is False


def test_the_demo_file_is_valid() -> None:
    assert load(ROOT / "pipelines/demo/pipeline.yaml").pipeline.run.name == "orders"


def test_platform_is_no_package() -> None:
    # With an __init__.py the folder would shadow the standard library's module of that name.
    assert not (ROOT / "platform/__init__.py").exists()
