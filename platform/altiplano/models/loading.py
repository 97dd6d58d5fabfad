"""From the `model` and `lora` sections to modules: safetensors only, never remote code.

torch, transformers and PEFT are imported by the functions that need them: whoever only asks where a model lies waits for none.
"""

from pathlib import Path
from typing import Any

from altiplano import spec
from altiplano.models.cria import cria_path
from altiplano.models.manifest import verify_manifest

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


class ModelError(ValueError):
    """A base model that cannot be used."""


def resolve_model_path(model: spec.Model) -> Path:
    """The local directory of a model: cria's own, the named directory, or the hub's cache (downloaded if it can be).

    Raises:
        ModelError: no such directory or hub model, or files missing from it.
    """
    if model.model_name_or_path == "cria":
        verify_manifest(cria_path())
        return cria_path()
    directory = Path(model.model_name_or_path)
    if not directory.is_dir():
        directory = _from_hub(model)
    for name in ("config.json", "tokenizer.json"):
        if not (directory / name).is_file():
            raise ModelError(
                f"{directory} has no {name}: model.model_name_or_path must be a complete model in Hugging Face's format"
            )
    if not any(directory.glob("*.safetensors")):
        pickles = sorted(p.name for pattern in PICKLES for p in directory.glob(pattern))
        hint = f"; {', '.join(pickles)} are pickles, which are never opened: convert them to safetensors" if pickles else ""
        raise ModelError(f"{directory} has no .safetensors file{hint}")
    return directory


def load_tokenizer(model: spec.Model) -> Any:
    """The model's fast tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve_model_path(model), trust_remote_code=False)


def load_base(model: spec.Model, device: str) -> Any:
    """The frozen base on `device`, in 4 bits where the section says so.

    Raises:
        ModelError: bitsandbytes is missing.
    """
    import torch
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {
        "dtype": getattr(torch, model.dtype),
        "attn_implementation": model.attn_implementation,
        "device_map": {"": device},
    }
    if model.load_in_4bit:
        options["quantization_config"] = _four_bits(model)
    made = AutoModelForCausalLM.from_pretrained(
        resolve_model_path(model), use_safetensors=True, trust_remote_code=False, **options
    )
    made.config.use_cache = False
    if model.load_in_4bit:
        _keep_gradients(made)
    return made


def attach_lora(base: Any, lora: spec.Lora, seed: int) -> Any:
    """`base`, in 4 bits or not, with a fresh adapter; the same for the same seed. Only the adapter learns.

    A 4-bit base keeps its embeddings and norms as loaded: PEFT's `prepare_model_for_kbit_training` would make them, and with
    them the residual stream, float32, which costs a third of the speed and 11 GB at 8 x 2 048 tokens of the 1B.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    settings = lora.model_dump()
    if not isinstance(settings["target_modules"], str):
        settings["target_modules"] = list(settings["target_modules"])
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", bias="none", **settings))


def _keep_gradients(base: Any) -> None:
    """Have a 4-bit base on the CPU learn after an evaluation as before it.

    bitsandbytes packs the weights at the first step in eval mode for a product that knows no gradients, where the CPU has AVX512-BF16, and they
    stay packed: what trains later gets gradients through the residual stream alone.
    """
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _four_bits(model: spec.Model) -> Any:
    try:
        import bitsandbytes  # noqa: F401  (transformers needs it for 4-bit weights)
    except ImportError as error:
        raise ModelError(
            "model.load_in_4bit needs bitsandbytes: pip install 'altiplano[gpu]', or set load_in_4bit=false"
        ) from error
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=model.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=model.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=getattr(torch, model.bnb_4bit_compute_dtype),
    )


def _from_hub(model: spec.Model) -> Path:
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            model.model_name_or_path,
            revision=model.model_revision,
            allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"],
        )
    except Exception as error:
        raise ModelError(
            f"{model.model_name_or_path!r} is no local directory, and the hub does not give it ({type(error).__name__}: {error}): "
            "check the name, the network, and access (HF_TOKEN)"
        ) from error
    return Path(found)
