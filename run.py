"""Run the tests or the demo, or fetch weights or sample data, in an environment of their own:

    python run.py test [pytest arguments]    ruff, mypy and pytest
    python run.py demo [--short]             teach a miniature model an edit on the CPU, in minutes
    python run.py weights NAME [--to DIR]    model files from the Hugging Face hub, e.g. of i2v-480p or flf2v-720p
    python run.py sample-data [--miniature]  photographs, files and tiny models for the commands of the README

The first call makes `.venv` beside this file and installs what pyproject.toml names, in the versions that
constraints.txt gives; later calls start at once. Only the standard library is used here.
"""

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "installed-by-run"  # what was installed
UNFINISHED = VENV / "unfinished"  # there while an installation runs, so also after one was interrupted

COMMANDS = {  # the arguments of the call go to the last line of each
    "test": [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"], ["pytest"]],
    "demo": [["demo"]],
    "sample-data": [["demo.sample_data"]],
    "weights": [["wan.files.weights"]],
}


def requirements(pyproject: str) -> "list[str]":
    """The dependencies and those of the test extra, from the text of pyproject.toml.

    Python 3.10 has no TOML reader, but a TOML list of strings is a Python list too.
    """
    lists = re.findall(r"^(?:dependencies|test) = (\[.*?\])$", pyproject, re.MULTILINE | re.DOTALL)
    return [name for text in lists for name in ast.literal_eval(text)]


def supported_minors(pyproject: str) -> range:
    """The `n` of the Python 3.n that `requires-python = ">=3.a,<3.b"` allows."""
    found = re.search(r'^requires-python = ">=3\.(\d+),<3\.(\d+)"', pyproject, re.MULTILINE)
    assert found, "pyproject.toml says which versions of Python are supported"
    return range(int(found[1]), int(found[2]))


def execute(*command: object) -> int:
    """Run a program in the project folder and return its exit code, as a shell would.

    Ctrl-C reaches the program too: it is given the time to end by itself.
    """
    process = subprocess.Popen(list(map(str, command)), cwd=str(ROOT))
    interrupted = False
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:
            interrupted = True
    if interrupted:
        raise KeyboardInterrupt
    return code if code >= 0 else 128 - code


def prepare(pyproject: str) -> int:
    """Make or update `.venv` unless the right things are installed already. Returns an exit code."""
    needed = requirements(pyproject)
    constraints = ROOT / "constraints.txt"
    wanted = hashlib.sha256("\n".join([*needed, constraints.read_text(encoding="utf-8")]).encode()).hexdigest()
    works = PYTHON.exists() and not UNFINISHED.exists()
    if works and STAMP.exists() and STAMP.read_text(encoding="utf-8") == wanted:
        return 0
    print("preparing .venv; the first time this downloads some hundred megabytes or more", flush=True)
    works = works and execute(PYTHON, "-m", "pip", "--version") == 0
    VENV.mkdir(exist_ok=True)
    UNFINISHED.touch()
    if not works:
        for entry in VENV.iterdir():  # what an interrupted call left is not worth trusting
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(str(entry))
            elif entry != UNFINISHED:
                entry.unlink()
        code = execute(sys.executable, "-m", "venv", VENV)
        if code:
            print("no environment could be made; on Debian and Ubuntu install python3-venv", file=sys.stderr)
            return code
    code = execute(PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "-c", constraints, *needed)
    if code == 0:
        STAMP.write_text(wanted, encoding="utf-8")
        UNFINISHED.unlink()
    return code


def main(arguments: "list[str]") -> int:
    """Returns the exit code: the first that is not 0, with all parts of the command run."""
    asks = bool({"-h", "--help"} & set(arguments)) and arguments[0] != "test"  # pytest has a help of its own
    if asks or not arguments or arguments[0] not in COMMANDS:
        print(__doc__.strip(), file=sys.stdout if asks else sys.stderr)
        return 0 if asks else 2
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    minors = supported_minors(pyproject)
    major, minor = sys.version_info[:2]
    if major != 3 or minor not in minors:
        print(
            f"Python {major}.{minor} is not supported; call run.py with 3.{minors[0]} to 3.{minors[-1]}, "
            f"e.g. python3.{minors[-1]} run.py {arguments[0]}",
            file=sys.stderr,
        )
        return 1
    try:
        code = prepare(pyproject)
        if code:
            return code
        *first, last = COMMANDS[arguments[0]]
        codes = [execute(PYTHON, "-m", *command) for command in [*first, last + arguments[1:]]]
        return next(filter(None, codes), 0)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
