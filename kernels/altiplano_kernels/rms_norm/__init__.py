"""Residual add and root-mean-square normalisation."""
