"""vLLM behind our engine's interface, where somebody has installed it; nothing here imports it before it is asked for."""
