"""`python run.py sample-data`: photographs, dataset files and prompts for the commands of the README and of the guide.

The pairs are photographs of scikit-image, before and after an edit. With `--miniature` the miniature models go into
`models`, so that every command runs as it stands, on a CPU too.
"""

import re
import shutil
import sys
from pathlib import Path

from demo.miniature import FOLDER as MINIATURE
from demo.photos import PHOTOS, write_pairs
from utils import cli
from utils.errors import ConfigError

_GUIDE = Path(__file__).resolve().parents[1] / "docs" / "one_frame.md"
# A fenced block after a line that is its file's name: `dataset.toml`:
_FILE = re.compile(r"^`(?P<name>[\w.]+)`:\n\n```\w+\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


def guide_files() -> dict[str, str]:
    """Name and text of every file that the guide shows."""
    return {block["name"]: block["text"] for block in _FILE.finditer(_GUIDE.read_text(encoding="utf-8"))}


def write(folder: Path, miniature: bool) -> None:
    """Write everything into `folder`. Raises ConfigError when some of it is there already; then nothing is written."""
    files = guide_files()
    for path in (folder / name for name in ["data", *files, *["models"][:miniature]]):
        if path.exists():
            raise ConfigError(f"{path}: exists; move it away, or give another folder with --to")
    write_pairs(folder / "data")
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    if miniature:
        shutil.copytree(MINIATURE, folder / "models")


def main(argv: list[str] | None = None) -> None:
    """Read the command line and write."""
    parser = cli.Parser(prog="run.py sample-data", description="Photographs and files for the commands of the README.")
    parser.add_argument("--to", type=Path, default=Path(), metavar="FOLDER", help="default: the folder of the project")
    parser.add_argument("--miniature", action="store_true", help="also the miniature models, as models/")
    args = parser.parse_args(argv)
    write(args.to, args.miniature)
    print(
        f"{len(PHOTOS)} pairs are in {args.to / 'data'}; the commands of README.md run on them in {args.to.resolve()}"
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
