"""Figures that every plan of a GPU's memory counts with."""

# Shares of the device's memory that no plan may use: workspaces of libraries and fragments of the allocator take them.
# Two figures: a plan chooses among few options and seldom fills the memory; recomputing fills it to the last block.
PLAN_MARGIN = 0.04
RECOMPUTE_MARGIN = 0.05

WEIGHT_BYTES = 4  # of a trained number, float32
TRAINED_BYTES = 4 * WEIGHT_BYTES  # of a trained number with its gradient and the two moments of AdamW
