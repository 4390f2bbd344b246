"""A loaded DiT that gets its LoRA files at other multipliers is the one that loads with them, bit for bit."""

from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from tests.dit_cases import DEVICES, random_dit, velocity, with_lora
from wan.files import load as checkpoint
from wan.files.formats import Checkpoint
from wan.fused import plain
from wan.fused.dit import fuse_
from wan.lora.files import read_lora
from wan.lora.merge import Merger
from wan.lora.network import save_lora
from wan.memory.block_swap import swap_blocks_

SHAPES = {name: tuple(tensor.shape) for name, tensor in random_dit().state_dict().items()}
TOUCHED = 12 * 4  # layers of a block with a LoRA, blocks


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A DiT in bfloat16, and a LoRA that changes all linear layers of its blocks."""
    folder = tmp_path_factory.mktemp("merging")
    save_file(
        {name: tensor.bfloat16() for name, tensor in random_dit().state_dict().items()}, folder / "dit.safetensors"
    )
    save_lora(folder / "lora.safetensors", with_lora(random_dit()), {})
    return folder / "dit.safetensors", read_lora(folder / "lora.safetensors")


def load(files, multiplier, device, **options):
    path, lora = files
    merger = Merger([(lora, multiplier)], SHAPES)
    return checkpoint.load_dit(path, None, device, merger, **options)


def merge_again_(dit, files, multiplier, device):
    path, lora = files
    merger = Merger([(lora, multiplier)], SHAPES)
    checkpoint.merge_again_(dit, path, device, merger, merger.names)


def swapping(count, **options):
    return lambda dit, device: swap_blocks_(dit, count, device, **options)


PREPARED = {  # how, and how many blocks wait in host memory
    "plain": (lambda _dit, _device: None, 0),
    "fused": (partial(fuse_, operations=plain), 0),  # q, k and v become one matrix
    **{f"{count} swapped": (swapping(count), count) for count in (1, 3, 4)},
    "2 page-locked": (swapping(2, pinned=True), 2),
}
CASES = [
    (how, fp8)
    for how, (_, swapped) in PREPARED.items()
    for fp8 in (None, "cast", "scaled", "rows")
    if not (fp8 == "rows" and swapped)  # whose blocks are not alike
]


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize(("how", "fp8"), CASES)
def test_weights_and_velocities_are_those_of_a_new_model(how, fp8, device, files):
    prepare_, swapped = PREPARED[how]
    dit, expected = (load(files, multiplier, device, fp8=fp8, blocks_on_host=swapped) for multiplier in (0.3, -1.7))
    weights = {name: tensor.cpu().clone() for name, tensor in expected.state_dict().items()}
    for model in (dit, expected):
        prepare_(model, device)
    before = velocity(dit)
    parameters = {name: parameter.data_ptr() for name, parameter in dit.named_parameters()}
    merge_again_(dit, files, -1.7, device)
    assert {name: parameter.data_ptr() for name, parameter in dit.named_parameters()} == parameters
    after = velocity(dit)
    assert torch.equal(after, velocity(expected)) and not torch.equal(after, before)
    for name, tensor in dit.state_dict().items():
        assert torch.equal(tensor.cpu().view(torch.uint8), weights[name].view(torch.uint8)), name


def test_only_what_the_lora_changes_is_read_again(files, monkeypatch):
    dit, read = load(files, 1, "cpu"), []
    original = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name, *more: read.append(name) or original(self, name, *more))
    merge_again_(dit, files, 2, "cpu")
    assert len(read) == len(set(read)) == TOUCHED and all("blocks" in name for name in read)
