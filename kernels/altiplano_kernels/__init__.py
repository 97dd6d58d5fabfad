"""GPU kernels of Altiplano, one folder each: kernel, torch reference, bench. Imports torch and triton only."""
