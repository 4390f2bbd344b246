"""`python run.py weights NAME`: the model files of a task from the Hugging Face hub, by name.

Mirrors, tokens and caches are those of the hub's own settings (HF_ENDPOINT, HF_TOKEN, `hf auth login`). A download that
was stopped goes on where it was.
"""

import hashlib
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from utils import cli
from utils.errors import ConfigError, suggest
from utils.files import require_writable_dir
from utils.text import one_line, table

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

_REPACKAGED = "Comfy-Org/Wan_2.1_ComfyUI_repackaged"
_OFFICIAL = "Wan-AI/Wan2.1-I2V-14B-480P"
_UNFINISHED = ".unfinished"  # what the names of downloads that are under way end in


@dataclass(frozen=True)
class HubFile:
    """A file of a repository, and where it goes in the folder of models."""

    repository: str
    path: str
    name: str


def _dit(name: str) -> HubFile:
    return HubFile(_REPACKAGED, f"split_files/diffusion_models/{name}", name)


_DITS = {
    "i2v-480p": _dit("wan2.1_i2v_480p_14B_bf16.safetensors"),
    "i2v-720p": _dit("wan2.1_i2v_720p_14B_bf16.safetensors"),
    "flf2v-720p": _dit("wan2.1_flf2v_720p_14B_fp16.safetensors"),
}
_SHARED = (
    *(HubFile(_OFFICIAL, name, name) for name in ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth")),
    HubFile(_OFFICIAL, *2 * ("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",)),
    HubFile("google/umt5-xxl", "tokenizer.json", "tokenizer/tokenizer.json"),
)
RELEASES: dict[str, tuple[HubFile, ...]] = {name: (dit, *_SHARED) for name, dit in _DITS.items()}
"""What a task needs beside the code, by the name that users give."""


def fetch(names: Iterable[str], folder: Path) -> None:
    """Download what is missing of RELEASES[name] into `folder`, and check what arrived. ConfigError for what fails."""
    files = list(dict.fromkeys(file for name in names for file in RELEASES[name]))
    require_writable_dir(folder, "--to")
    found = {file: _metadata(file) for file in files}
    missing = [file for file in files if not _is_there(folder / file.name, found[file])]
    rows = [(file.name, _readable(found[file].size), "" if file in missing else "is there") for file in files]
    print(*table(rows), sep="\n")
    if missing:
        begun = sum(path.stat().st_size for file in missing if (path := _unfinished(file, folder)).exists())
        _check_space(folder, sum(found[file].size or 0 for file in missing) - begun)
    for file in missing:
        _download(file, found[file], folder)
    print(f"all files are in {folder}; the scripts find them with --ckpt_dir {folder}")


def _metadata(file: HubFile) -> "HfFileMetadata":
    from huggingface_hub import get_hf_file_metadata

    try:
        return get_hf_file_metadata(_address(file))
    except Exception as error:  # each library below the hub's has its own exceptions
        raise _refused(file, error) from None


def _address(file: HubFile) -> str:
    from huggingface_hub import hf_hub_url

    return hf_hub_url(file.repository, file.path)


def _is_there(path: Path, expected: "HfFileMetadata") -> bool:
    return path.is_file() and path.stat().st_size == expected.size


def _unfinished(file: HubFile, folder: Path) -> Path:
    target = folder / file.name
    return target.with_name(target.name + _UNFINISHED)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"--to {folder}: {_readable(needed)} are still to come, {_readable(free)} are free; make room, or give "
            "another folder"
        )


def _download(file: HubFile, expected: "HfFileMetadata", folder: Path) -> None:
    """Into a file of another name until it is whole. `hf_hub_download` would begin anew after every stop."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined] # exported by a __getattr__

    target, unfinished = folder / file.name, _unfinished(file, folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    headers = build_hf_headers()
    if urlsplit(expected.location).netloc != urlsplit(_address(file)).netloc:
        headers.pop("authorization", None)  # the token is for the hub alone, not for where it keeps large files
    if expected.size is not None and unfinished.exists() and unfinished.stat().st_size > expected.size:
        unfinished.unlink()  # of another version of the file
    try:
        with unfinished.open("ab") as opened:
            http_get(
                *(expected.location, opened),
                resume_size=opened.tell(),
                headers=headers,
                expected_size=expected.size,
                displayed_filename=target.name,
            )
    except Exception as error:
        raise _refused(file, error) from None
    if not _is_whole(unfinished, expected):
        unfinished.unlink()
        raise ConfigError(f"{file.name}: did not arrive as {file.repository} has it, and was deleted; run this again")
    unfinished.replace(target)
    print(f"saved {target}")


def _is_whole(path: Path, expected: "HfFileMetadata") -> bool:
    """Whether size and, for a large file, whose etag is its SHA-256, content are those of the hub."""
    if expected.size is not None and path.stat().st_size != expected.size:
        return False
    if len(expected.etag or "") != 2 * hashlib.sha256().digest_size:
        return True
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while chunk := opened.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest() == expected.etag


def _refused(file: HubFile, error: Exception) -> ConfigError:
    """One line for what the hub's library raises, which has the address and the cause in many."""
    from huggingface_hub import errors

    place = f"{file.repository}/{file.path}"
    if isinstance(error, errors.GatedRepoError | errors.RepositoryNotFoundError):
        return ConfigError(f"{place}: is not open to you; log in with 'hf auth login', or set HF_TOKEN")
    if isinstance(error, errors.EntryNotFoundError):
        return ConfigError(f"{place}: is not there; the repository has changed, or HF_ENDPOINT lacks the file")
    if isinstance(error, OSError) and not isinstance(error, errors.HfHubHTTPError) and error.strerror:
        return ConfigError(f"{file.name}: could not be written ({one_line(error.strerror)}); run this again to go on")
    return ConfigError(
        f"{place}: the hub cannot be reached ({one_line(type(error).__name__)}); check the network, or set HF_ENDPOINT "
        "to a mirror, and run this again"
    )


def _readable(size: int | None) -> str:
    if size is None:
        return "unknown size"
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def main(argv: list[str] | None = None) -> None:
    """Read the command line and fetch."""
    listed = ", ".join(RELEASES)
    parser = cli.Parser(prog="run.py weights", description="Download the model files of a task, by name.")
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"one or more of {listed}")
    parser.add_argument("--to", type=Path, default=Path("models"), metavar="FOLDER", help="default: models")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in RELEASES:
            raise ConfigError(f"weights {one_line(name)}: unknown{suggest(name, RELEASES) or f'; use {listed}'}")
    fetch(args.names, args.to)


if __name__ == "__main__":
    cli.run(main)
