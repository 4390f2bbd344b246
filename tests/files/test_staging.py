"""Weights that come through buffers are the file's, whatever the sizes, on a CPU in place of the GPU."""

import json
import os
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from wan.files import staging
from wan.files.formats import open_checkpoint
from wan.files.staging import FileTensor, staged

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(staging, "_PART", 8)


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "weight": torch.randn(33, 7),
        "half": torch.randn(5, 9).bfloat16(),
        "eight": torch.randn(3, 50).to(torch.float8_e4m3fn),
        "number": torch.tensor(3.5),
        "nothing": torch.empty(0, 4),
        "transposed": torch.randn(6, 11).t(),
    }


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found.float(), expected.float())


@pytest.mark.parametrize("size", [1, 13, 64, 4096], ids="buffers of {} bytes".format)
@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_what_arrives_is_what_the_file_holds(tmp_path, size, kind):
    path, expected = tmp_path / f"model.{kind}", {name: t.contiguous() for name, t in tensors().items()}
    if kind == "pth":
        torch.save(expected, path)
    else:
        save_file(expected, path)
    file = open_checkpoint(path, "--dit")
    assert all(isinstance(reader, FileTensor) == (kind == "safetensors") for reader in file.readers.values())
    order = sorted(expected, reverse=True)
    found = list(staged([(name, file.readers[name]) for name in order], CPU, size, threads=3))
    assert [name for name, _ in found] == order
    assert all(same(tensor, expected[name]) for name, tensor in found)


def test_tensors_of_any_layout_in_memory_arrive():
    expected = tensors()
    found = dict(staged([(name, partial(expected.get, name)) for name in expected], CPU, 32))
    assert all(same(found[name], expected[name]) for name in expected)


def test_next_tensors_are_read_while_one_is_in_use(tmp_path):
    asked = []

    def read(number: int) -> torch.Tensor:
        asked.append(number)
        return torch.full((4,), float(number))

    arriving = staged([(str(i), partial(read, i)) for i in range(10)], CPU, 64)
    assert next(arriving)[0] == "0" and asked == [0, 1, 2, 3, 4]
    arriving.close()


def test_a_file_that_shrank_since_its_header_was_read_is_an_error(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(64)}, path)
    reader = open_checkpoint(path, "--dit").readers["weight"]
    os.truncate(path, path.stat().st_size - 8)
    for read in (
        reader,
        lambda: list(staged([("weight", reader)], CPU, 4096)),
        lambda: reader.fill(memoryview(bytearray(256)), 0),
    ):
        with pytest.raises(OSError, match="ends too early"):
            read()


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="asks a POSIX system for its memory")
def test_a_file_larger_than_the_memory_is_read_tensor_by_tensor(tmp_path):
    path, size = tmp_path / "model.safetensors", 4 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    places = {"large": ([size - 4], [0, size - 4]), "last": ([4], [size - 4, size])}
    header = {name: {"dtype": "U8", "shape": s, "data_offsets": at} for name, (s, at) in places.items()}
    content = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + size)  # a hole, which takes no space on the disk
        file.seek(-4, os.SEEK_END)
        file.write(bytes([1, 2, 3, 4]))
    found = open_checkpoint(path, "--dit").readers["last"]()
    assert found.tolist() == [1, 2, 3, 4]
    found[0] = 5
    assert open_checkpoint(path, "--dit").readers["last"]().tolist() == [1, 2, 3, 4]
