"""Opening model files: headers first, weights one by one. What the tensors mean is up to wan/files/names.py.

`.safetensors`, torch pickles that hold tensors only, `.gguf` by way of the `gguf` package. Whatever a file holds, the
worst outcome is a ConfigError of one line; code in it is never run.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from utils.errors import ConfigError
from utils.files import ends_in_zeros, not_downloaded, require_file
from utils.text import one_line, some
from wan.files.staging import FileTensor, staged

if TYPE_CHECKING:
    import numpy.typing as npt

log = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]

_PART = re.compile(r"(?P<prefix>.*)(?P<part>\d{5})-of-(?P<count>\d{5})\.safetensors")
_INDEX = ".index.json"  # of a split model, as transformers and diffusers write it
_PICKLES = (".pth", ".pt", ".bin", ".ckpt")
_ZIP_MAGIC = b"PK\x03\x04"
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_GGUFOrder = Literal["I", "S", "<"]  # of the bytes: the machine's, the other one, little-endian
_GGUF_DTYPES = {kind: _SAFETENSORS_DTYPES[kind] for kind in ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8")}


@dataclass(frozen=True)
class TensorInfo:
    """Shape, dtype and storage of a tensor, from a header."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    packed: bool = False  # stored in fewer bits and scales, read as float32; `dtype` is then what to keep it in

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


Header = tuple[TensorInfo, Callable[[], Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one model, of which only the headers have been read."""

    flag: str
    path: Path
    tensors: dict[str, TensorInfo]
    readers: dict[str, Callable[[], Tensor]]  # name -> the tensor, mapped from the file where possible
    scales: dict[str, Callable[[], Tensor]] = field(default_factory=dict)  # name -> factors of the stored tensor

    @property
    def label(self) -> str:
        """The start of every message about this file."""
        return f"{self.flag} {self.path}"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tensors.items()}

    def read(self, name: str, device: torch.device | str) -> Tensor:
        """One tensor on `device`, in the dtype of the file; float32 when it is packed."""
        return self._scaled(name, self.readers[name]().to(device))

    def read_all(self, names: Iterable[str], device: torch.device | str) -> Iterator[tuple[str, Tensor]]:
        """(name, what `read` gives) one after the other, on CUDA with the next ones on their way meanwhile."""
        device = torch.device(device)
        if device.type != "cuda":
            yield from ((name, self.read(name, device)) for name in names)
            return
        for name, tensor in staged(((name, self.readers[name]) for name in names), device):
            yield name, self._scaled(name, tensor)

    def _scaled(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self.scales:
            return tensor
        blocks = blocks_of_scale(self.read_scale(name, tensor.device), tensor.shape)
        return (tensor.float().reshape(*blocks.shape[:-1], -1) * blocks).reshape(tensor.shape)

    def read_scale(self, name: str, device: torch.device | str) -> Tensor:
        """Factors of the stored numbers of a tensor in `scales`, float32."""
        return self.scales[name]().to(device).float()


def blocks_of_scale(scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A scale of a weight [out, ...] -> [rows, blocks per row, 1]; rows is `out`, or 1 with one scale for all.

    Scales may be one number, one per row ([out] or [out, 1]), or one per block of a row ([out, blocks, 1]).
    ValueError when it fits no such form.
    """
    if scale.numel() == 1:
        return scale.reshape(1, 1, 1)
    blocks = scale.shape[1] if scale.ndim == 3 else 1
    row = prod(shape[1:])
    if not shape or scale.numel() != shape[0] * blocks or scale.shape[0] != shape[0] or not blocks or row % blocks:
        raise ValueError(f"{list(scale.shape)} for a weight of {list(shape)}")
    return scale.reshape(shape[0], blocks, 1)


def open_checkpoint(path: str | Path, flag: str, rename: Callable[[str], str | None] = str) -> Checkpoint:
    """Read the headers of a model file; `rename` turns the names in the file into official ones, None drops a tensor.

    `.safetensors` (of a model split into `<prefix>NNNNN-of-NNNNN.safetensors` any part, or of any its `.index.json`:
    all are read), `.gguf`, or a torch pickle (`.pth .pt .bin .ckpt`) that holds tensors only. Raises ConfigError naming
    `flag`, the file, the reason and the fix.
    """
    path = require_file(path, flag)
    tensors: dict[str, TensorInfo] = {}
    readers: dict[str, Callable[[], Tensor]] = {}
    for part in _parts(path, flag):
        label = f"{flag} {part}"
        for stored, (info, reader) in _read_headers(part, label).items():
            name = rename(stored)
            if name in tensors:
                raise ConfigError(f"{label}: tensor '{one_line(name)}' appears twice; use the original files")
            if name is not None:
                tensors[name], readers[name] = info, reader
    return Checkpoint(flag, path, tensors, readers)


def _parts(path: Path, flag: str) -> list[Path]:
    """All files of the model that `path` belongs to."""
    if path.name.endswith(_INDEX):
        return _indexed(path, flag)
    split = _PART.fullmatch(path.name)
    if split is None:
        return [path]
    count = int(split["count"])
    parts = [path.with_name(f"{split['prefix']}{i:05d}-of-{count:05d}.safetensors") for i in range(1, count + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise ConfigError(
            f"{flag} {path}: not all of its {count} parts are here ({some(missing, rest=', ...')}); download the rest"
        )
    return parts if path in parts else [path]


def _indexed(path: Path, flag: str) -> list[Path]:
    """The parts that the index of a split model names, which lie beside it."""
    try:
        names = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
        if not names or any(not name or Path(name).name != name for name in names):
            raise ValueError
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        reason = not_downloaded(path) or "is not the index of a split model; give one of its parts"
        raise ConfigError(f"{flag} {path}: {reason}") from None
    if missing := [name for name in names if not path.with_name(name).is_file()]:
        raise ConfigError(
            f"{flag} {path}: not all of its {len(names)} parts are here "
            f"({one_line(some(missing, rest=', ...'))}); download the rest"
        )
    return [path.with_name(name) for name in names]


def _read_headers(path: Path, label: str) -> dict[str, Header]:
    """{stored name: (info, reader)} of one file."""
    suffix = path.suffix.lower()
    kinds = {".safetensors": _safetensors_headers, ".gguf": _gguf_headers, **dict.fromkeys(_PICKLES, _pickle_headers)}
    if suffix not in kinds:
        raise ConfigError(f"{label}: is not named like a model file; use one of {' '.join(kinds)}")
    try:
        headers = kinds[suffix](path)
        if ends_in_zeros(path):
            log.warning("%s: ends in zeros, as a download that broke off; compare its size or checksum", label)
        return headers
    except _NotAllowedError as error:
        raise ConfigError(f"{label}: {error}") from None
    except Exception as error:  # damaged files make the readers raise nearly anything
        if other := not_downloaded(path):
            reason = other
        elif suffix in _PICKLES:
            reason = "is damaged, incomplete or holds code, which is never run; download it again or use safetensors"
        else:
            reason = f"is damaged or incomplete ({one_line(error)}); download it again"
        raise ConfigError(f"{label}: {reason}") from None


class _NotAllowedError(Exception):
    """The file is sound, but not of a kind that we read."""


def _safetensors_headers(path: Path) -> dict[str, Header]:
    with safe_open(path, framework="np") as file:  # checks it
        names = file.keys()
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")  # of the header, which names places behind it
        stored = json.loads(stream.read(size))
    headers: dict[str, Header] = {}
    for name in names:
        kind, (start, _) = stored[name]["dtype"], stored[name]["data_offsets"]
        dtype = _SAFETENSORS_DTYPES.get(kind)
        if dtype is None:
            raise _NotAllowedError(f"tensor '{one_line(name)}' has the dtype {kind}; use a bf16, fp16 or fp32 file")
        info = TensorInfo(tuple(stored[name]["shape"]), dtype)
        headers[name] = info, FileTensor(path, 8 + size + start, info.shape, dtype)
    return headers


def _pickle_headers(path: Path) -> dict[str, Header]:
    with path.open("rb") as file:
        is_zip = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
    # Only the zip format can be mapped; the one from before torch 1.6 has to be read whole
    table = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    if not isinstance(table, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout is torch.strided
        for name, tensor in table.items()
    ):
        raise _NotAllowedError("holds something else than tensors by name; use the official file or safetensors")
    return {
        name: (TensorInfo(tuple(tensor.shape), tensor.dtype), partial(tensor.detach)) for name, tensor in table.items()
    }


def _gguf_headers(path: Path) -> dict[str, Header]:
    try:
        import gguf
        import numpy as np
    except ImportError:
        raise _NotAllowedError('needs the package gguf; run: pip install ".[gguf]"') from None

    class Reader(gguf.GGUFReader):
        """GGUFReader that refuses a file which claims to hold more than it does; the base would read on for years."""

        def _get(
            self, offset: int, dtype: npt.DTypeLike, count: int = 1, override_order: _GGUFOrder | None = None
        ) -> npt.NDArray[Any]:
            if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError("it ends too early")
            return super()._get(offset, dtype, count, override_order)

    file = Reader(path)
    if file.byte_order == "S":
        raise _NotAllowedError("is for processors of the other byte order; use a safetensors file")

    def read(stored: gguf.ReaderTensor, info: TensorInfo) -> Tensor:
        is_raw = stored.data.dtype == np.uint8  # bytes of a type that NumPy has not
        values = gguf.dequantize(stored.data, stored.tensor_type) if is_raw else np.array(stored.data)
        tensor = torch.from_numpy(values).reshape(info.shape)
        return tensor if info.packed else tensor.to(info.dtype)

    headers: dict[str, Header] = {}
    for stored in file.tensors:
        kind = stored.tensor_type
        shape = tuple(reversed(stored.shape.tolist()))
        # ComfyUI-GGUF folds shapes that ggml does not take, and notes them (its tools/convert.py)
        if (original := file.get_field(f"comfy.gguf.orig_shape.{stored.name}")) is not None:
            shape = tuple(int(size) for size in original.contents())
        if prod(shape) != stored.n_elements:
            raise ValueError(f"{stored.name} does not have the size that its shape says")
        packed = kind.name not in _GGUF_DTYPES
        if packed:
            try:
                gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            except NotImplementedError:
                raise _NotAllowedError(f"nothing here reads its quantisation {kind.name}; use Q8_0") from None
        info = TensorInfo(shape, torch.bfloat16 if packed else _GGUF_DTYPES[kind.name], packed)
        headers[stored.name] = info, partial(read, stored, info)
    return headers


def check_tensors(expected: Shapes, found: Shapes, what: str) -> None:
    """Raise one ConfigError, starting with `what`, for all missing, unexpected and misshapen tensors."""
    wrong = [
        f"{name} is {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    groups = {"missing": missing, "unexpected": unexpected, "of the wrong shape": wrong}
    problems = [
        f"{len(names)} {kind} ({one_line(some(names, rest=', ...'), 300)})" for kind, names in groups.items() if names
    ]
    if problems:
        raise ConfigError(f"{what}: of its tensors {', '.join(problems)}; use a file in the original Wan2.1 layout")
