"""Altiplano tunes, fine-tunes, evaluates and serves Llama 3.2 on Ray and Kubernetes."""

__version__ = "0.1.0"
