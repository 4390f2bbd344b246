"""Wan2.1 networks, one-frame layout, sampling, training and the generation pipeline."""

__version__ = "0.1.0"
