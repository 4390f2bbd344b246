"""Temporary files: those of killed processes go at the next run, those of running ones stay."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.project import cache_latents, cache_texts, dataset_toml
from utils.files import require_writable_dir, written_whole
from utils.leftovers import remove_leftovers

ROOT = Path(__file__).parents[2]
WRITING = """
import sys, time
from pathlib import Path
from utils.files import written_whole
with written_whole(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    print(temporary, flush=True)
    time.sleep(100)
"""


def made_old(path: Path) -> Path:
    """Older than the moment in which a file may have no lock yet."""
    os.utime(path, (time.time() - 60,) * 2)
    return path


@pytest.mark.skipif(sys.platform == "win32", reason="files have no locks of this kind there")
def test_a_file_goes_once_its_process_is_killed_and_not_before(tmp_path):
    command = [sys.executable, "-c", WRITING, str(tmp_path / "猫 1.safetensors")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, encoding="utf-8") as program:
        left = made_old(Path(program.stdout.readline().rstrip("\n")))
        remove_leftovers(tmp_path)
        kept = left.exists()
        program.kill()
    assert kept and left.exists()
    require_writable_dir(tmp_path, "--out")
    assert not [*tmp_path.iterdir()]


@pytest.mark.skipif(sys.platform == "win32", reason="files have no locks of this kind there")
def test_nothing_else_is_taken_for_a_leftover(tmp_path):
    names = [".tmp-a-12345678.log", ".tmp-12345678.png", "tmp-a-12345678.png", ".tmp-a.png", ".tmp-a-1234.png"]
    for name in names:
        (tmp_path / name).touch()
        made_old(tmp_path / name)
    (tmp_path / ".tmp-state-12345678.png").mkdir()
    (tmp_path / ".tmp-new.png-12345678.png").touch()
    with written_whole(tmp_path / "own.png") as temporary:
        temporary.touch()
        remove_leftovers(made_old(temporary).parent)
        assert temporary.exists()
    assert {path.name for path in tmp_path.iterdir()} == {
        *names,
        ".tmp-state-12345678.png",
        ".tmp-new.png-12345678.png",
        "own.png",
    }


@pytest.mark.skipif(sys.platform == "win32", reason="files have no locks of this kind there")
@pytest.mark.usefixtures("copied_workspace")
def test_caching_deletes_what_a_killed_run_left():
    config = dataset_toml("pairs", keys="fp_1f_clean_indices = [0]\nfp_1f_target_index = 1")
    for again in (cache_latents, cache_texts):
        left = Path("cache/pairs/.tmp-cat_0320x0213_wan.safetensors-abcd_123.safetensors")
        left.write_bytes(b"half")
        made_old(left)
        again(config, "--skip_existing")
        assert not left.exists()
