"""The packages: every module is on the architecture page, and imports keep their order."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")


def test_the_architecture_page_lists_every_module_and_none_else():
    listed = {
        folder: sorted(name for row in rows.splitlines() for name in re.findall(r"`([^`]+)`", row.split("|")[1]))
        for folder, rows in re.findall(r"^\| in `([\w/]+)/`.*\n\|---.*\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    }
    packages = (ROOT / "utils", ROOT / "dataset", *(ROOT / "wan").rglob("."))
    there = {
        folder.relative_to(ROOT).as_posix(): sorted({path.name for path in folder.glob("*.py")} - {"__init__.py"})
        for folder in packages
        if (folder / "__init__.py").exists()
    }
    assert listed == there


def test_nothing_replaces_a_method_of_a_module():
    """Networks have seams instead: `WanDiT.runner` and `pass_runner`, and `operation` in the VAE."""
    replaced = re.compile(r"\.(forward|compute|predict|_attend) *= ")
    assert not [path for path in (ROOT / "wan").rglob("*.py") if replaced.search(path.read_text(encoding="utf-8"))]


def test_no_package_has_more_than_18_modules():
    folders = {path.parent for package in ("utils", "dataset", "wan") for path in (ROOT / package).rglob("*.py")}
    assert all(len(list(folder.glob("*.py"))) <= 19 for folder in folders), "18 and __init__.py"


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as lint; lint()", "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8", check=False)


def test_imports_keep_the_contracts_of_pyproject():
    run = lint_imports(ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
