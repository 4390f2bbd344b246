"""The documented commands: they name real flags, and run as they stand on tiny checkpoints."""

import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dataset import config, problems
from dataset.sources import find_all_items
from demo.photos import PHOTOS, photo, write_pairs
from demo.tiny_models import FILES
from tests.test_options import FLAGS
from tests.tiny_checkpoints import write_tiny_checkpoints
from utils.errors import ConfigError
from utils.parsing import read_toml
from wan.generation import prompt, recipe
from wan.lora.files import read_lora
from wan.lora.options import NetworkArguments

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (*ROOT.glob("README*.md"), *sorted(ROOT.glob("docs/*.md")))
}
README, GUIDE, TRAINING = PAGES["README.md"], PAGES["docs/one_frame.md"], PAGES["docs/training.md"]
GENERATION, INTEROP = PAGES["docs/generation.md"], PAGES["docs/interop.md"]
ARCHITECTURE, MIGRATION = PAGES["docs/architecture.md"], PAGES["docs/migration.md"]
_TRANSLATED = ("README", *(f"docs/{page}" for page in ("one_frame", "dataset", "training", "generation", "comfyui")))
JAPANESE = {f"{name}.md": f"{name}.ja.md" for name in _TRANSLATED}
ENGLISH = "".join(text for name, text in PAGES.items() if name not in JAPANESE.values())

# A fenced block, and the file that it is when the line before it is the file's name: `dataset.toml`:
_BLOCK = re.compile(r"(?:^`(?P<name>[\w.]+)`:\n\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str, kind: str) -> list[str]:
    return [block["text"] for block in _BLOCK.finditer(text) if block["kind"] == kind]


def files(text: str) -> dict[str, str]:
    return {block["name"]: block["text"] for block in _BLOCK.finditer(text) if block["name"]}


def commands(text: str) -> list[list[str]]:
    """The words of every command of the bash blocks, lines joined."""
    lines = "".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines]


def script_of(command: list[str]) -> int:
    """Where the script's name stands in the words of a command."""
    return next(i for i, word in enumerate(command) if word.endswith(".py"))


def table(heading: str, page: str = GUIDE) -> list[list[str]]:
    """The cells of the first table after a heading, without the two heading rows."""
    rows = re.search(rf"^#+ {heading}$.*?^((?:\|[^\n]*\n)+)", page, re.MULTILINE | re.DOTALL)[1].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def code(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


@pytest.mark.parametrize("command", commands(ENGLISH), ids=lambda words: words[script_of(words)])
def test_every_flag_of_a_documented_command_exists(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("output").mkdir()
    settings = 'dataset_config = "dataset.toml"\noutput_dir = "output"\noutput_name = "my-lora"'
    Path("output/my-lora-settings.toml").write_text(settings, encoding="utf-8")
    script = script_of(command)
    parser = importlib.import_module(command[script].removesuffix(".py")).build_parser()
    actions = [action for found in (parser, *subparsers(parser)) for action in found._actions]
    known = {name for action in actions if action.help != "==SUPPRESS==" for name in action.option_strings}
    assert {word for word in command[script:] if word.startswith("--")} <= known
    parser.parse_args(command[script + 1 :])


def subparsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Those of the commands of a script that has several."""
    choices = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [found for named in choices for found in named.values()]


def test_a_misspelt_flag_would_be_noticed():
    parser = importlib.import_module("wan_generate_video").build_parser()
    with pytest.raises(ConfigError, match="--one_frame_inference"):
        parser.parse_args(["--save_path", "x", "--one_frame_inferense", "target_index=1"])


def test_the_readme_shows_commands_of_the_guide():
    assert len(commands(README)) == 4
    assert all(block in blocks(GUIDE, "bash") for block in blocks(README, "bash"))


def test_every_japanese_page_is_compared_with_its_english_edition():
    assert set(JAPANESE.values()) == {name for name in PAGES if name.endswith(".ja.md")}


translated = pytest.mark.parametrize(("english", "japanese"), JAPANESE.items(), ids=_TRANSLATED)


@translated
def test_the_japanese_edition_has_the_same_commands_and_files(english, japanese):
    english, japanese = PAGES[english], PAGES[japanese]
    for kind in ("bash", "toml", "json", "jsonl"):
        assert blocks(japanese, kind) == blocks(english, kind)
    assert files(japanese) == files(english)


@translated
def test_the_text_blocks_of_the_japanese_edition_differ_in_translated_remarks_only(english, japanese):
    english, japanese = ("".join(blocks(PAGES[name], "text")).splitlines() for name in (english, japanese))
    remark = re.compile(r"<[^>]*>|\s{2,}\S.*")  # a placeholder, or what stands in a second column
    for ours, theirs in zip(japanese, english, strict=True):
        assert ours == theirs or (not ours.isascii() and remark.sub("", ours) == remark.sub("", theirs))


@translated
def test_the_japanese_edition_has_the_same_tables_flags_and_keys(english, japanese):
    english, japanese = (_FENCED.sub("", PAGES[name]) for name in (english, japanese))
    theirs, ours = ([code(row) for row in page.splitlines() if row.startswith("|")] for page in (english, japanese))
    assert ours == theirs
    theirs, ours = ({" ".join(words.split()) for words in code(page)} for page in (english, japanese))
    assert ours == theirs


@translated
def test_the_japanese_edition_has_the_same_sections_and_leads_to_japanese_pages(english, japanese):
    theirs, ours = (re.findall(r"^#+(?= )", _FENCED.sub("", PAGES[name]), re.MULTILINE) for name in (english, japanese))
    assert ours == theirs
    links = [ROOT / Path(japanese).parent / link for link in re.findall(r"\]\(([^)#]+)", PAGES[japanese])]
    in_english = [name for link in links if (name := Path(os.path.relpath(link, ROOT)).as_posix()) in JAPANESE]
    assert in_english == [english]  # the line below the title
    assert f"[日本語]({Path(japanese).name})" in PAGES[english]


@pytest.mark.parametrize(
    ("heading", "kind"),
    [("Flags that are refused", "refused"), ("Flags without effect", "ignored"), ("Flags that are only here", "ours")],
)
def test_the_migration_page_lists_the_flags_of_each_kind(heading, kind):
    listed = {flag.removeprefix("--") for row in table(heading, MIGRATION) for flag in code(row[0])}
    assert listed == {flag for flags in FLAGS.values() for flag in flags[kind].split()}


def test_every_flag_and_key_that_the_migration_page_names_is_known():
    flags = {flag for kinds in FLAGS.values() for names in kinds.values() for flag in names.split()}
    assert set(re.findall(r"--(\w+)", MIGRATION)) <= flags | set(prompt.LETTERS)
    named = {word for row in table("Datasets", MIGRATION) for word in code(row[0]) if re.fullmatch(r"\w+", word)}
    assert named <= {*config._FIELDS, *config._REFUSED, "target_mask"}


def test_every_option_and_key_that_the_training_page_names_exists():
    options = {action.dest for action in importlib.import_module("wan_train_network").build_parser()._actions}
    others = {"d", "num_cpu_threads_per_process", "num_processes"}  # of prompt lines and of accelerate
    assert set(re.findall(r"--(\w+)", TRAINING)) - others <= options | {"help"}
    no_effect = {"conv_dim", "conv_alpha"}  # the blocks hold no convolutions
    keys = {field.name for field in fields(NetworkArguments)} - no_effect
    assert keys <= set(re.findall(r"[`\"](\w+)[`=]", TRAINING))


def test_every_dataset_key_is_in_the_table_and_none_else():
    assert set(re.findall(r"`(\w+)`", "".join(row[0] for row in table("Images")))) == set(config._FIELDS)


def test_every_prompt_option_is_in_the_table_with_its_key():
    options = {}
    for names, keys, *_ in table("Prompt lines")[1:]:
        options |= dict(zip(re.findall(r"--(\w+)", names), re.findall(r"`(\w+)`", keys), strict=True))
    assert options == {letters: option.key for letters, option in prompt.LETTERS.items()}


def test_the_picture_sizes_in_the_text_are_right():
    from utils.images import size_for_area

    asked, made = re.search(r"(\d+ × \d+) with a square start image gives (\d+ × \d+)", GUIDE).groups()
    height, width = map(int, asked.split(" × "))
    assert size_for_area(width, height, 500, 500) == tuple(map(int, made.split(" × ")))


def anchors(page: str) -> set[str]:
    """What a link to a heading of the page ends in, as GitHub makes it."""
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings}


def test_links_and_pictures_lead_somewhere():
    for page, text in ((ROOT / name, text) for name, text in PAGES.items()):
        for link in re.findall(r"\]\((?!https:)([^)]+)\)", text):
            path, _, anchor = link.partition("#")
            target = (page.parent / path) if path else page
            assert target.is_file(), link
            assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


# A page with the heading after it; and the files and sections of a specification that is not part of this repository.
_CITED = re.compile(r"\b(docs/[\w.]+\.md)(?:#([\w-]+))?")
_ELSEWHERE = re.compile(r"\b[Ss]pec (?:\w+\.md|[0-9])|(?<![\w/])(?:formats|cli|dataset|models|video)\.md\b")
_TOPS = ("wan", "dataset", "utils", "demo", "benchmarks", "tests")
SOURCES = sorted(path for glob in ("*.py", *(f"{top}/**/*.py" for top in _TOPS)) for path in ROOT.glob(glob))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_the_code_cites_is_in_the_documents(path):
    text = path.read_text(encoding="utf-8")
    assert not _ELSEWHERE.findall(text)
    for page, anchor in _CITED.findall(text):
        assert page in PAGES and (not anchor or anchor in anchors(PAGES[page])), f"{page}#{anchor}"


@pytest.mark.parametrize("text", ["spec {}.md 8.4", "({}.md 9.4)", "Spec {}.md section 7"])
def test_a_citation_of_something_else_would_be_noticed(text):
    assert _ELSEWHERE.search(text.format("formats"))


def test_the_readme_leads_to_every_page():
    for readme, pages in (("README.md", set(PAGES)), ("README.ja.md", set(PAGES) - set(JAPANESE))):
        linked = {link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", PAGES[readme])}
        assert pages - {readme} <= linked, readme


def test_the_install_line_names_the_pinned_torch():
    pin = re.search(r"^torch==.*$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)[0]
    assert f"pip install {pin} " in README


def test_there_are_a_dozen_photographs_and_each_pair_differs(tmp_path):
    write_pairs(tmp_path)
    assert len(PHOTOS) >= 12 and len(list((tmp_path / "ends").iterdir())) == 2 * len(PHOTOS)
    for name in PHOTOS:
        start, middle, target = (Image.open(tmp_path / f / f"{name}.png") for f in ("start", "middle", "target"))
        assert start.size == middle.size == target.size and start.mode == "RGB"
        assert start.tobytes() == photo(name).tobytes() == Image.open(tmp_path / f"ends/{name}_0.png").tobytes()
        assert len({start.tobytes(), middle.tobytes(), target.tobytes()}) == 3
        assert (tmp_path / f"target/{name}.txt").read_text(encoding="utf-8").startswith(PHOTOS[name][0])


def test_photographs_are_the_same_each_time(tmp_path):
    for name in ("a", "b"):
        write_pairs(tmp_path / name, names=("cat",))
    assert (tmp_path / "a/target/cat.png").read_bytes() == (tmp_path / "b/target/cat.png").read_bytes()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A checkout with the documented models and images in it, the former those of the recordings."""
    folder = tmp_path_factory.mktemp("checkout")
    for source in (*ROOT.glob("wan_*.py"), ROOT / "wan", ROOT / "dataset", ROOT / "utils"):
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / source.name)
    write_tiny_checkpoints(folder / "models")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_pairs(Path("data"))
    for name, text in files(GUIDE).items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_the_configuration_files_fit_the_documented_folders(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    assert set(files(GUIDE)) == {
        *("dataset.toml", "dataset_list.toml", "dataset_flf2v.toml", "prompts.txt", "prompts_flf2v.txt"),
    }
    for name in files(GUIDE):
        if name.endswith(".toml"):
            assert find_all_items(config.read_config(name))
    for block in blocks(GUIDE, "json"):
        lines = Path("data/pairs.jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(block) in [json.loads(line) for line in lines]
    indices = [dataset.get("fp_1f_clean_indices") for dataset in read_toml(Path("dataset_flf2v.toml"), "")["datasets"]]
    assert indices == [[0, 2]]


def run_blocks(section: str, folder: Path) -> None:
    """Run the bash blocks of a part of the guide in `folder`, each as a user would paste it."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for block in blocks(section, "bash"):
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=folder,
            env=os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert result.returncode == 0, f"{block}\n{result.stdout[-4000:]}"


@pytest.mark.skipif(shutil.which("bash") is None, reason="the commands are written for bash")
def test_the_commands_of_the_guide_run_as_they_stand(workplace):
    i2v, flf2v = re.split(r"^## flf2v", GUIDE, flags=re.MULTILINE)
    with ThreadPoolExecutor(2) as pool:  # they share no files but the models and photographs
        list(pool.map(run_blocks, (i2v, flf2v), (workplace, workplace)))

    def count(pattern: str) -> int:
        return len(list(workplace.glob(pattern)))

    for folder in ("cache", "cache_list", "cache_flf2v"):
        assert count(f"data/{folder}/*_wan.safetensors") == count(f"data/{folder}/*_wan_te.safetensors") == len(PHOTOS)
    for name, modules, samples in (("my-lora", 12 * 3, 2), ("my-flf2v-lora", 12 * 2, 1)):
        for suffix in ("", "-step00000030"):
            lora = read_lora(workplace / "output" / f"{name}{suffix}.safetensors", "--lora_weight")
            assert len(lora.modules) == modules
        assert count(f"output/sample/{name}_*.png") == 2 * samples  # before and after
    for folder, pictures in {
        **{"results": 1, "results_batch": 2, "results_latent": 1, "results_decoded": 1},
        **{"results_flf2v": 1, "results_flf2v_end": 1, "results_flf2v_batch": 1},
    }.items():
        assert count(f"{folder}/*.png") == pictures, folder
        for path in workplace.glob(f"{folder}/*.png"):
            width, height = Image.open(path).size
            assert width % 16 == height % 16 == 0 and abs(width * height / (384 * 576) - 1) < 0.1
    assert count("results_latent/*_latent.safetensors") == 1
    (latent,), (decoded,) = (
        list(workplace.glob(f"{folder}/*.png")) for folder in ("results_latent", "results_decoded")
    )
    assert Image.open(latent).tobytes() == Image.open(decoded).tobytes()
    (single,), (given,) = (list(workplace.glob(f"{folder}/*.png")) for folder in ("results_flf2v", "results_flf2v_end"))
    assert single.read_bytes() == given.read_bytes()  # the end image is the control with the largest index either way


def write_lora(path: Path, dit: Path, modules: list[str], **metadata: str) -> None:
    """A LoRA for some modules of a model, in the form that few-step LoRAs have."""
    weights = load_file(dit)
    tensors = {}
    for name in modules:
        out, inputs = weights[f"{name}.weight"].shape
        tensors[f"diffusion_model.{name}.lora_down.weight"] = torch.ones(4, inputs) * 1e-3
        tensors[f"diffusion_model.{name}.lora_up.weight"] = torch.ones(out, 4) * 1e-3
        tensors[f"diffusion_model.{name}.diff_b"] = torch.ones(out) * 1e-3
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, metadata)


@pytest.mark.skipif(shutil.which("bash") is None, reason="the commands are written for bash")
def test_the_commands_of_the_page_on_generation_run_as_they_stand_and_repeat_a_picture(workplace):
    first, *_ = commands(GENERATION)
    mine, distilled = (workplace / word for word in first if "output/my-lora" in word or "distill" in word)
    dit = workplace / "models" / FILES["i2v"]
    if not mine.is_file():
        write_lora(mine, dit, ["blocks.0.self_attn.q"], ss_one_frame="control_index=0,target_index=1")
    write_lora(distilled, dit, ["blocks.0.self_attn.k", "blocks.1.ffn.0"])
    run_blocks(GENERATION, workplace)
    fast, again, other = (
        next((workplace / folder).iterdir()) for folder in ("results_fast", "results_again", "results_other_seed")
    )
    assert fast.read_bytes() == again.read_bytes() and fast.read_bytes() != other.read_bytes()
    settings = recipe.read(fast).options
    assert 4 <= settings["infer_steps"] <= 8 and settings["guidance_scale"] == 1 and len(settings["lora_weight"]) == 2


@pytest.mark.skipif(shutil.which("bash") is None, reason="the commands are written for bash")
def test_the_commands_of_the_page_on_other_tools_run_as_they_stand(workplace):
    dit, output = workplace / "models" / FILES["i2v"], workplace / "output"
    for name in ("my-lora", "other-lora"):
        if not (output / f"{name}.safetensors").is_file():
            write_lora(output / f"{name}.safetensors", dit, ["blocks.0.self_attn.q"])
    shutil.copy(output / "my-lora.safetensors", output / "my-lora-step00000015.safetensors")
    tuned = load_file(dit)
    tuned["blocks.0.self_attn.q.weight"] *= 2
    save_file(tuned, workplace / "models" / "tuned.safetensors")
    run_blocks(INTEROP, workplace)
    written = {path.name for path in output.iterdir()}
    assert {word.partition("/")[2] for words in commands(INTEROP) for word in words if "output/" in word} <= written


@pytest.mark.skipif(shutil.which("bash") is None, reason="the commands are written for bash")
def test_the_commands_of_the_page_on_datasets_run_as_they_stand_and_write_nothing_but_the_sheet(workplace):
    caching = "".join(f"```bash\n{block}```\n" for block in blocks(README, "bash")[:2])
    if not (workplace / "data/cache").is_dir():
        run_blocks(caching, workplace)
    before = {path: path.stat().st_mtime_ns for path in workplace.rglob("*") if path.is_file()}
    run_blocks(PAGES["docs/dataset.md"], workplace)
    after = {path: path.stat().st_mtime_ns for path in workplace.rglob("*") if path.is_file()}
    changed = {path.name for path in after if after[path] != before.get(path) and path.suffix != ".pyc"}
    assert changed == {"sheet.html", "sheet.png"}


@pytest.mark.parametrize("page", ["docs/dataset.md", JAPANESE["docs/dataset.md"]])
def test_the_page_on_datasets_lists_every_kind_of_problem(page):
    listed = re.findall(r"^\| (D\d+) \| (error|warning) \| .{10,} \|$", PAGES[page], re.MULTILINE)
    assert listed == [(code, kind.severity) for code, kind in problems.KINDS.items()]
