"""The sizes of a Llama, read from its config.json, and the counts that follow from them."""

import json
from dataclasses import dataclass
from pathlib import Path


class ShapeError(ValueError):
    """A config.json that is missing or does not describe a Llama."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama-architecture model; counts are in parameters."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of the seven linear layers of one block: q, k, v, o, gate, up, down."""
        query = self.num_attention_heads * self.head_dim
        key = self.num_key_value_heads * self.head_dim
        hidden, wide = self.hidden_size, self.intermediate_size
        return ((hidden, query), (hidden, key), (hidden, key), (query, hidden), (hidden, wide), (hidden, wide), (wide, hidden))

    @property
    def body(self) -> int:
        """Parameters of the linear layers of all blocks."""
        return self.num_hidden_layers * sum(i * o for i, o in self.linears)

    @property
    def head(self) -> int:
        """Parameters of the LM head."""
        return self.hidden_size * self.vocab_size

    @property
    def total(self) -> int:
        """All parameters; a tied embedding counts once."""
        embeddings = self.head if self.tie_word_embeddings else 2 * self.head
        norms = (2 * self.num_hidden_layers + 1) * self.hidden_size
        return self.body + embeddings + norms

    def adapter(self, r: int) -> int:
        """Parameters of a LoRA adapter of rank `r` on all linear layers."""
        return self.num_hidden_layers * r * sum(i + o for i, o in self.linears)


def read_shape(model_dir: Path) -> ModelShape:
    """The shape in `model_dir`/config.json.

    Raises:
        ShapeError: no file, not JSON, or not a Llama.
    """
    path = model_dir / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise ShapeError(
            f"{path} cannot be read ({error.strerror}): model.model_name_or_path must be a directory with a Hugging Face model"
        ) from error
    except ValueError as error:
        raise ShapeError(f"{path} is not JSON ({error}): download the model again") from error
    if config.get("model_type") != "llama":
        raise ShapeError(f"{path} says model_type {config.get('model_type')!r}: Altiplano runs models of type 'llama'")
    heads = config["num_attention_heads"]
    return ModelShape(
        hidden_size=config["hidden_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads", heads),
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        intermediate_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        tie_word_embeddings=config.get("tie_word_embeddings", False),
    )
