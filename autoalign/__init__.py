"""Load any PyTorch checkpoint into any implementation of the same network."""

__version__ = "0.1.0"
