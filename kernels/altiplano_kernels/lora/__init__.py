"""Low-rank updates of several adapters in one batch."""
