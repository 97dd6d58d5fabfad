"""cria's tokenizer: byte-level BPE with Llama 3.2's special tokens, learned from the corpus.

python pipelines/cria/tokenizer.py platform/altiplano/models/cria/weights
"""

import sys
from itertools import islice
from pathlib import Path

from corpus import dialogues
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 2048
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
# Llama 3's split, but with every digit on its own: a small model copies numbers digit by digit.
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
HEADER = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"


def render(messages: list[dict[str, str]]) -> str:
    """A dialogue in Llama 3.2's format; the fast twin of the chat template (a test holds them equal)."""
    first = messages[0]["role"] == "system"
    text = f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{HEADER}{messages[0]['content'] if first else ''}<|eot_id|>"
    for message in messages[first:]:
        text += f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n{message['content']}<|eot_id|>"
    return text


def train(rows: int, seed: int) -> Tokenizer:
    """Learn merges from `rows` dialogues."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((HEADER + m["content"] for d in islice(dialogues(seed), rows) for m in d), trainer)
    return tokenizer


def main() -> None:
    from transformers import PreTrainedTokenizerFast

    from altiplano.data.templates import serving_text

    directory = Path(sys.argv[1])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=train(rows=60_000, seed=7),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = serving_text()
    fast.save_pretrained(directory)
    print(f"{len(fast)} tokens in {directory}")


if __name__ == "__main__":
    main()
