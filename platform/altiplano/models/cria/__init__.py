"""cria, a baby llama: the base model of the demo. Its weights ship with the package; pipelines/cria/pretrain.py made them."""

from pathlib import Path


def cria_path() -> Path:
    """Directory of the model: config, tokenizer, safetensors, manifest."""
    return Path(__file__).parent / "weights"
