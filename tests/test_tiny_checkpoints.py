"""The checkpoints of the recordings are made again as they were."""

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_checkpoints import CHECKPOINTS, digest


@pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX"),
    reason="torch rounds its normal numbers in another way on CPUs without AVX2",
)
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_every_tensor_is_that_of_the_recordings_bit_for_bit(kind):
    assert digest(CHECKPOINTS[kind].tensors().items()) == CHECKPOINTS[kind].sha256


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_file_holds_the_tensors_in_the_container_of_the_published_one(kind, tiny):
    if tiny[kind].suffix == ".pth":
        stored = torch.load(tiny[kind], weights_only=True)
        assert type(stored) is dict and list(stored) == list(CHECKPOINTS[kind].shapes())
    else:
        stored = load_file(tiny[kind])
    expected = CHECKPOINTS[kind].tensors()
    assert digest((name, stored[name]) for name in expected) == digest(expected.items())
    assert stored.keys() == expected.keys()


def test_the_digest_sees_name_dtype_shape_and_every_value():
    zeros, changed = torch.zeros(2, 3), torch.zeros(2, 3)
    changed[1, 2] = -0.0
    others = [("b", zeros), ("a", zeros.view(torch.int32)), ("a", zeros.view(3, 2)), ("a", changed)]
    assert len({digest([case]) for case in [("a", zeros), *others]}) == 5
