"""The checkpoints of the recordings are made again as they were."""

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_checkpoints import CHECKPOINTS, digest


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_every_tensor_is_that_of_the_recordings_bit_for_bit(kind, tiny):
    stored = torch.load(tiny[kind], weights_only=True) if tiny[kind].suffix == ".pth" else load_file(tiny[kind])
    names = list(CHECKPOINTS[kind].shapes())
    assert type(stored) is dict and stored.keys() == set(names)
    assert digest((name, stored[name]) for name in names) == CHECKPOINTS[kind].sha256


def test_the_digest_sees_name_dtype_shape_and_every_value():
    zeros, changed = torch.zeros(2, 3), torch.zeros(2, 3)
    changed[1, 2] = -0.0
    others = [("b", zeros), ("a", zeros.view(torch.int32)), ("a", zeros.view(3, 2)), ("a", changed)]
    assert len({digest([case]) for case in [("a", zeros), *others]}) == 5
