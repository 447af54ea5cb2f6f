"""RLHF restricted to sparse-autoencoder feature coefficients."""

__version__ = "0.1.0"
