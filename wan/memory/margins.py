"""Figures that every plan of a GPU's memory counts with."""

# Shares of the device's memory that no plan may use: workspaces of libraries and fragments of the allocator take them.
PLAN_MARGIN = 0.04  # before a run, whose parts `wan/models/estimate.py` rounds up
RECOMPUTE_MARGIN = 0.05  # in a running step, where measured activations are filled up to the last block that fits

WEIGHT_BYTES = 4  # of a trained number, float32
TRAINED_BYTES = 4 * WEIGHT_BYTES  # of a trained number with its gradient and the two moments of AdamW
