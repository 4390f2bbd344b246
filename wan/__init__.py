"""Wan2.1 networks, one-frame layout, sampling, training and the generation pipeline."""
