"""All four scripts on tiny random models and four photographs, without a download: `python run.py demo`."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from demo.tiny_models import FILES, write_models
from tests.photos import write_pairs

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "demo" / "out"

DATASET = """\
[general]
resolution = [128, 128]
caption_extension = ".txt"
enable_bucket = true

[[datasets]]
image_directory = "data/target"
control_directory = "data/start"
cache_directory = "data/cache"
fp_1f_clean_indices = [0]
fp_1f_target_index = 1
"""


def commands() -> list[list[str]]:
    """The arguments of each script, with paths relative to OUT."""
    dit, vae, t5, clip = ([f"--{kind}", f"models/{FILES[kind]}"] for kind in ("i2v", "vae", "t5", "clip"))
    dit = ["--task", "i2v-14B", "--dit", dit[1]]
    t5 = [*t5, "--t5_tokenizer", f"models/{FILES['tokenizer']}"]
    data = ["--dataset_config", "dataset.toml"]
    image = "data/start/cat.png"
    return [
        ["wan_cache_latents.py", *data, *vae, *clip, "--one_frame"],
        ["wan_cache_text_encoder_outputs.py", *data, *t5],
        [
            *("wan_train_network.py", *dit, *data, "--sdpa", "--network_dim", "8", "--learning_rate", "1e-3"),
            *("--timestep_sampling", "shift", "--discrete_flow_shift", "3", "--max_train_steps", "10", "--seed", "1"),
            *("--output_dir", "lora", "--output_name", "evening", "--max_data_loader_n_workers", "0"),
        ],
        [
            *("wan_generate_video.py", *dit, *vae, *t5, *clip, "--lora_weight", "lora/evening.safetensors"),
            *("--prompt", "a cat looking up in the evening light", "--control_image_path", image),
            *("--one_frame_inference", "control_index=0,target_index=1", "--video_size", "128", "128"),
            *("--infer_steps", "4", "--seed", "1", "--output_type", "images", "--save_path", "pictures"),
        ],
    ]


def main() -> int:
    shutil.rmtree(OUT, ignore_errors=True)
    print(f"Writing tiny random models and four pairs of photographs to {OUT}", flush=True)
    write_models(OUT / "models")
    write_pairs(OUT / "data", names=("astronaut", "cat", "coffee", "rocket"))
    (OUT / "dataset.toml").write_text(DATASET, encoding="utf-8")
    for script, *arguments in commands():
        print(f"\n$ python {shlex.join([script, *arguments])}", flush=True)
        code = subprocess.call([sys.executable, str(ROOT / script), *arguments], cwd=OUT)
        if code:
            return code
    (picture,) = (OUT / "pictures").glob("*.png")
    print(f"\nThe picture is {picture}. It is noise, because the weights of the models are random numbers.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
