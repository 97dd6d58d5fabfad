"""The gated activation of a Llama feed-forward layer."""
