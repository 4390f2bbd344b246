"""The benchmarks run: on a CPU with a tiny model, so that they still do when a GPU is there."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(script: str, *flags: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--size", "tiny", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_the_table_of_memory_options_has_a_row_for_each():
    rows = [line for line in run("memory_options.py", "--repeat", "1").splitlines() if line.startswith("| ")]
    assert len(rows) == 8 and all(row.count("|") == 5 for row in rows) and "does not fit" not in "".join(rows)


def test_one_frame_speed_prints_a_row_for_each_case_and_the_top_operations_of_one():
    text = run("one_frame_speed.py", "--repeat", "1", "--profile", "forward bf16 32x32 2 frames")
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| work")]
    assert len(rows) == 16 and all(row.count("|") == 9 for row in rows) and "failed" not in text
    assert text.count("ceiling") == 4 and "Self CPU" in text


def test_rows_of_one_frame_speed_can_be_chosen():
    text = run("one_frame_speed.py", "--repeat", "1", "--only", "VAE encode", "guided")
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| ") and "work" not in line]
    assert rows and all("VAE encode" in row or "guided" in row for row in rows)


def test_training_speed_prints_images_per_second():
    assert "images per second" in run("training_speed.py", "--steps", "1", "--width", "64", "--height", "64")


def test_start_up_prints_the_stages_of_each_run(tmp_path):
    lines = run("start_up.py", "--folder", str(tmp_path)).splitlines()
    rows = [line.split("|")[1:-1] for line in lines if line.startswith("|")]
    assert [row[0].strip() for row in rows if "picture" in row[0]][-2:] == ["one picture", "4 pictures"]
    heads = [head.strip() for head in rows[0]]
    assert {"imports, checks", "loading T5", "loading the DiT", "denoising", "in all"} <= set(heads)
    seconds = [float(cell) for cell in rows[-1][1:]]
    assert seconds[-1] == pytest.approx(sum(seconds[:-1]), abs=0.1 * len(seconds))
    assert len(list((tmp_path / "pictures").glob("*.png"))) in (5, 6)


def test_caching_speed_prints_items_per_second():
    rows = [line.split("|")[2:5] for line in run("caching_speed.py", "--items", "8").splitlines() if "32x32" in line]
    assert len(rows) == 1 and all(float(cell) > 0 for cell in rows[0])


def test_small_cards_prints_what_each_would_do():
    rows = [line for line in run("small_cards.py", "--repeat", "1").splitlines() if ", host " in line]
    kinds = [row.split("|")[1].split(",")[0].strip() for row in rows]
    assert kinds == ["training"] * 4 + ["generation"] * 3
    assert all(float(row.split("|")[-2]) >= 0 for row in rows)
