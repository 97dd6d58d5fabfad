"""Small Llamas made on the spot, and the one that ships."""

import copy
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from altiplano.models.cria import cria_path

VOCAB = 120
ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cria() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(cria_path(), dtype=torch.float32)


def make_llama(directory: Path, seed: int = 0, *, tied: bool = False, vocab: int = VOCAB) -> LlamaForCausalLM:
    """A random Llama whose logits differ enough that greedy choices are never ties."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        rope_parameters=ROPE | {"original_max_position_embeddings": 64},
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(directory)
    return model


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    directory = tmp_path_factory.mktemp("llama")
    return directory, make_llama(directory)


def greedy(model: LlamaForCausalLM, prompt: list[int], n: int) -> list[int]:
    """What transformers answers, without ending early."""
    out = model.generate(torch.tensor([prompt]), max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=2)
    return [int(token) for token in out[0, len(prompt) :]]


def bits(tokens: Iterable[int]) -> bytes:
    """The set of tokens as the engine takes it: a bit for each, lowest bit first."""
    mask = bytearray(-(-VOCAB // 8))
    for token in tokens:
        mask[token // 8] |= 1 << token % 8
    return bytes(mask)


def make_adapter(directory: Path, seed: int, kind: str) -> PeftModel:
    """Save a random adapter (lora, rslora or dora) of `make_llama(seed=0)` in `directory`; returns the tuned model."""
    base = make_llama(directory / "base")
    torch.manual_seed(seed)
    settings = LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules="all-linear",
        use_rslora=kind == "rslora",
        use_dora=kind == "dora",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    tuned = get_peft_model(base, settings).eval()
    for name, parameter in tuned.named_parameters():
        if "magnitude" in name:  # as if it had learned something
            parameter.data *= 1 + 0.3 * torch.randn_like(parameter)
    tuned.save_pretrained(directory)
    return tuned


def make_draft(model: LlamaForCausalLM, directory: Path, *, dropped: int = 0, noise: float = 0.05) -> LlamaForCausalLM:
    """Save a draft for `model` in `directory`: fewer layers, the others a little disturbed; it is often right and often wrong."""
    draft = copy.deepcopy(model)
    draft.model.layers = draft.model.layers[: len(draft.model.layers) - dropped]
    draft.config.num_hidden_layers -= dropped
    torch.manual_seed(9)
    for parameter in draft.parameters():
        parameter.data += noise * parameter.data.std() * torch.randn_like(parameter)
    draft.save_pretrained(directory)
    return draft
