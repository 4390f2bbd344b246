"""Weights and activations that are smaller, elsewhere or recomputed."""
