"""Ways to fit a finished model into less memory; each wraps it from outside."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks_(model: nn.Module) -> None:
    """Recompute the activations of each of `model.blocks` in the backward pass instead of keeping them.

    Gradients are the same; a training step takes about a third more time and keeps one tensor per block.
    """
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
