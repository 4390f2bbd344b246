"""Figures that every plan of a GPU's memory counts with."""

# Shares of the device's memory that no plan may use: workspaces of libraries and fragments of the allocator take them.
# Two figures, since the first is added to an estimate of a whole run, which has slack of its own where options are few,
# and the second to measured activations, which fill the memory up to the last block that fits.
PLAN_MARGIN = 0.04
RECOMPUTE_MARGIN = 0.05

WEIGHT_BYTES = 4  # of a trained number, float32
TRAINED_BYTES = 4 * WEIGHT_BYTES  # of a trained number with its gradient and the two moments of AdamW
