"""The packages: every module is on the architecture page, imports keep their order, and modules hold no state."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


SOURCES = sorted(path for top in ("utils", "dataset", "wan") for path in (ROOT / top).rglob("*.py"))
_MUTATORS = {
    "add",
    "append",
    "clear",
    "discard",
    "extend",
    "insert",
    "pop",
    "popitem",
    "remove",
    "setdefault",
    "update",
}


def state_of(tree: ast.Module) -> list[str]:
    """Expressions and statements that change a variable of the module from within it."""
    assigned = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    stored = [name for node in assigned for name in ast.walk(node) if isinstance(getattr(name, "ctx", None), ast.Store)]
    names = {name.id for name in stored if isinstance(name, ast.Name)}
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Global():
                found.append(node)
            case ast.Call(func=ast.Attribute(value=ast.Name(name), attr=method)) if method in _MUTATORS:
                found += [node] * (name in names)
            case (
                ast.Attribute(value=ast.Name(name), ctx=ast.Store())
                | ast.Subscript(value=ast.Name(name), ctx=ast.Store())
            ):
                found += [node] * (name in names)
    return [ast.unparse(node) for node in found]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_modules_hold_no_state(path):
    assert not state_of(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("line", ["global seen", "seen['a'] = 1", "seen.update(a=1)", "seen.clear()", "seen.a = 1"])
def test_state_of_a_module_would_be_noticed(line):
    assert state_of(ast.parse(f"seen = {{}}\ndef f():\n    {line}\n"))


def test_pictures_are_opened_in_one_place():
    """There the formats are listed: Pillow alone decides by a file's bytes, and starts Ghostscript for an EPS."""
    sources = [*SOURCES, *(ROOT / "demo").rglob("*.py"), *ROOT.glob("*.py")]
    opening = [path.relative_to(ROOT).as_posix() for path in sources if "Image.open(" in path.read_text("utf-8")]
    assert opening == ["utils/images.py"]


_LEANS_ON_THE_NAME = re.compile(r"(As|It|Its|Of|That|The same|Their|These|Those|What)\b")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_docstrings_stand_without_the_line_above_them(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = ast.FunctionDef | ast.ClassDef | ast.Module
    texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented)]
    assert not [text for text in texts if _LEANS_ON_THE_NAME.match(text)]


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as lint; lint()", "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8", check=False)


def test_imports_keep_the_contracts_of_pyproject():
    run = lint_imports(ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
