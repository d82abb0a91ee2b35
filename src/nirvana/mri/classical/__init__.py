"""Reconstructions without a neural network, and BART's."""
