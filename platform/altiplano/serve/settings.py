"""Everything that one endpoint needs to know."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ServeSettings:
    """`adapters` by name to directory; `aliases` to names of adapters. Sizes in tokens. JSON-ready, because Ray Serve carries it."""

    model_path: str
    served_model_name: str
    adapters: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    date_string: str = "26 Jul 2024"
    template_digest: str | None = None
    engine: str = "altiplano"  # or "vllm"
    dtype: str = "float32"
    device: str = "cpu"
    max_model_len: int = 2048
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    block_size: int = 32
    kv_cache_tokens: int = 65536
    kv_cache_dtype: str = "auto"
    quantization: str = "none"
    num_speculative_tokens: int = 0
    speculative_model: str | None = None
    speculative_quantization: str = "none"
    itl_target_ms: float | None = None
    deterministic: bool = False
    enable_prefix_caching: bool = True
