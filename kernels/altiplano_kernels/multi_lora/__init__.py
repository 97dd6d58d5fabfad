"""Low-rank updates of many adapters in one batch, for decode steps in CUDA graphs and for prompts."""
