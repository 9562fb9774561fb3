"""Sparse autoencoders on language-model activations, trained in closed loop."""

__version__ = "0.1.0"
