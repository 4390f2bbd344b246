"""From the start of the process to the picture: wan_generate_video.py on files of the real sizes with random weights.

    python benchmarks/start_up.py --folder random               writes 46 GB there unless they are, and needs as much
    python benchmarks/start_up.py --folder random --flags="--fp8_fast"
    python benchmarks/start_up.py --folder random --size tiny   a smoke test on a CPU, in seconds

384x576, one control image, 20 steps with guidance. Cold: the files were dropped from the page cache before, where the
system can do that (Linux); what the disk gives then is measured first, by as many threads as load weights. What a run
does not spend in a stage, it spends importing and checking.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

from benchmarks.random_model import SPECS, write_release
from demo.tiny_models import FILES
from wan.files.staging import THREADS

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ("a person waves", "a person sits down", "a person turns around", "a person jumps")
_PART = 16 << 20  # bytes
STAGE = re.compile(r"([a-zA-Z0-9 ]+) ([0-9.]+) s")


def drop_from_cache(folder: Path) -> None:
    """Let the kernel forget what it keeps of the files."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def disk_speed(path: Path) -> float:
    """Bytes per second at which threads read a file that is not in the page cache."""

    size = path.stat().st_size

    def read(start: int) -> None:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            file.readinto(bytearray(min(_PART, size - start)))

    start = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(read, range(0, size, _PART)):
            pass
    return size / (time.perf_counter() - start)


def generate(folder: Path, size: tuple[int, int], steps: int, flags: list[str]) -> dict[str, float]:
    """Seconds of each stage of a run, in the order that the run names them, and of the whole."""
    models = {"dit": "i2v", "vae": "vae", "t5": "t5", "clip": "clip", "t5_tokenizer": "tokenizer"}
    command = [sys.executable, str(ROOT / "wan_generate_video.py"), *flags]
    command += [part for flag, kind in models.items() for part in (f"--{flag}", str(folder / FILES[kind]))]
    command += ["--control_image_path", str(folder / "start.png")]
    command += ["--one_frame_inference", "control_index=0,target_index=1", "--infer_steps", str(steps)]
    command += ["--video_size", *map(str, size), "--save_path", str(folder / "pictures")]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    total = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(done.stderr)
    line = next(line for line in done.stderr.splitlines() if line.startswith("time: "))
    stages = {name.strip(): float(seconds) for name, seconds in STAGE.findall(line.removeprefix("time: "))}
    return {"imports, checks": total - sum(stages.values()), **stages, "in all": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--size", choices=SPECS, default="14B")
    parser.add_argument("--flags", default="", help="more flags of wan_generate_video.py, as one text")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    if not (folder / FILES["tokenizer"]).is_dir():  # written last
        write_release(folder, arguments.size)
    noise = np.random.default_rng(0).integers(0, 255, (576, 384, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "start.png")
    (folder / "prompts.txt").write_text("".join(f"{prompt} --d 1\n" for prompt in PROMPTS), encoding="utf-8")
    size, steps = ((64, 48), 2) if arguments.size == "tiny" else ((576, 384), 20)
    one, several = ["--prompt", PROMPTS[0], "--seed", "1"], ["--from_file", str(folder / "prompts.txt")]
    cases = {"one picture, cold": one, "one picture": one, f"{len(PROMPTS)} pictures": several}
    if not hasattr(os, "posix_fadvise"):
        del cases["one picture, cold"]
    for number, (name, flags) in enumerate(cases.items()):
        if name.endswith("cold"):
            drop_from_cache(folder)
            dit = folder / FILES["i2v"]
            print(
                f"the disk gives {disk_speed(dit) / 1e9:.2f} GB/s of the {dit.stat().st_size / 1e9:.1f} GB of the DiT"
            )
            drop_from_cache(folder)
        seconds = generate(folder, size, steps, flags + shlex.split(arguments.flags))
        if number == 0:
            print("| run | " + " | ".join(seconds) + " |\n|" + "---|" * (len(seconds) + 1))
        print(f"| {name} | " + " | ".join(f"{value:.1f}" for value in seconds.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
