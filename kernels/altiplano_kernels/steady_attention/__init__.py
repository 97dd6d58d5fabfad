"""Attention whose result for a token is the same, to the bit, in a prompt's chunk and alone: keys in parts of a fixed size, added up in their
order. Held against `paged_attention.reference`."""
