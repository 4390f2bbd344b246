"""Scripts whose messages nobody can read, and scripts that are asked to end."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
posix = pytest.mark.skipif(os.name == "nt", reason="redirections of a POSIX shell, and its signals")
TALKS = """
import logging, os, sys
from contextlib import suppress
from tqdm import tqdm
from utils import cli

def main():
    for number in tqdm(range(3), mininterval=0):
        logging.getLogger("x").warning("a line")
        print("another", file=sys.stderr, flush=True)
    with open("done.txt", "w") as file:
        with suppress(OSError):
            os.write(2, b"from a library")
        file.write("done")

cli.run(main)
"""


@posix
@pytest.mark.parametrize("redirection", ["2>&-", ">&- 2>&- <&-", "2>/dev/full", "2>&1 | true"])
def test_a_script_goes_on_when_nobody_can_read_its_messages(redirection, tmp_path):
    if "/dev/full" in redirection and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / "talks.py").write_text(TALKS)
    code = tmp_path / "code"
    command = f"( {sys.executable} talks.py; echo $? > code ) {redirection}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment, capture_output=True, timeout=60)
    assert (tmp_path / "done.txt").read_text() == "done" and code.read_text().strip() == "0"


WAITS = """
import signal, time
from pathlib import Path
from utils import cli
from utils.files import written_whole

def main():
    with written_whole("half.txt"):
        print("ready", flush=True)
        time.sleep(60)

cli.run(main)
"""


@posix
@pytest.mark.usefixtures("heeded_signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_script_that_is_asked_to_end_leaves_nothing_half_written(name, tmp_path):
    command = [sys.executable, "-c", WAITS]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + getattr(signal, name) and errors.endswith("everything finished so far is kept\n")
    assert len(errors.splitlines()) == 1 and not list(tmp_path.iterdir())
