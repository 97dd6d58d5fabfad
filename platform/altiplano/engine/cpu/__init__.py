"""The backend for laptops and tests: the kernels' torch references, on any torch device."""
