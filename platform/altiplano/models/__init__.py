"""Base models, tokenizers and adapters on disk and in memory.

May import: spec, torch, transformers, peft, safetensors. Must never know: Ray, MLflow, HTTP.
"""
