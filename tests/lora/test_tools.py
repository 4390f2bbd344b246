"""wan_lora.py: exact answers for small files, and the documented commands."""

import logging
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import wan_lora
from tests.dit_cases import SPEC, random_dit
from tests.helpers import rel_l2
from tests.lora.test_keys import theirs
from utils.errors import ConfigError
from wan.lora.files import read_lora
from wan.lora.merge import Merger
from wan.lora.tools import extract, inspect, merge, resize, truncated

DOCS = Path(__file__).resolve().parents[2] / "docs" / "interop.md"
Q, FFN = "lora_unet_blocks_0_self_attn_q", "lora_unet_blocks_1_ffn_0"
SHAPES = {Q: (12, 8), FFN: (20, 12)}
NAMES = {"blocks.0.self_attn.q.weight": Q, "blocks.1.ffn.0.weight": FFN}


def lora(path, rank=3, alpha=2.0, seed=0, names=(Q, FFN), metadata=None, **extra):
    """A LoRA of two layers, and further tensors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(extra)
    for name in names:
        out, inputs = SHAPES[name]
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, inputs, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(out, rank, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path, metadata)
    return path


def changes(*files):
    """What these files and multipliers add to the two weights, each a float64 sum."""
    shapes = {weight: SHAPES[name] for weight, name in NAMES.items()}
    merger = Merger([(read_lora(path), by) for path, by in files], shapes)
    return {weight: merger(weight, torch.zeros(shape)).double() for weight, shape in shapes.items()}


def test_a_merged_file_does_what_its_sources_do_together(tmp_path):
    a, b = lora(tmp_path / "a.safetensors"), lora(tmp_path / "b.safetensors", 2, 5.0, 1, names=(FFN,))
    merge([a, b], [0.5, -1.5], tmp_path / "c.safetensors")
    expected, found = changes((a, 0.5), (b, -1.5)), changes((tmp_path / "c.safetensors", 1.0))
    for name, change in expected.items():
        assert_close(found[name], change, rtol=1e-5, atol=1e-5)
    modules = read_lora(tmp_path / "c.safetensors").modules
    assert {name: (module.rank, module.scale) for name, module in modules.items()} == {Q: (3, 1.0), FFN: (5, 1.0)}


def test_merging_adds_differences_and_lets_a_full_one_take_in_low_ranks(tmp_path):
    full, bias = torch.randn(20, 12), torch.randn(20)
    a = lora(tmp_path / "a.safetensors", **{f"{FFN}.diff_b": bias})
    b = lora(tmp_path / "b.safetensors", names=(), **{f"{FFN}.diff": full, f"{FFN}.diff_b": bias})
    merge([a, b], [2.0], tmp_path / "c.safetensors")
    expected, found = changes((a, 2.0), (b, 1.0)), changes((tmp_path / "c.safetensors", 1.0))
    for name, change in expected.items():
        assert_close(found[name], change, rtol=1e-5, atol=1e-5)
    parts = read_lora(tmp_path / "c.safetensors").modules[FFN].parts
    assert parts.keys() == {"diff", "diff_b"} and torch.equal(parts["diff_b"], 3 * bias)


def test_merged_metadata_are_those_that_the_files_share(tmp_path, caplog):
    same = {"ss_one_frame": "control_index=0,target_index=1", "ss_network_dim": "3"}
    a = lora(tmp_path / "a.safetensors", metadata=same | {"ss_seed": "1"})
    b = lora(tmp_path / "b.safetensors", metadata=same | {"ss_seed": "2"})
    merge([a, b], [], tmp_path / "c.safetensors")
    metadata = read_lora(tmp_path / "c.safetensors").metadata
    assert "ss_seed" not in metadata and metadata["ss_one_frame"] == same["ss_one_frame"]
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("6", "6.0")
    assert metadata["ss_merged_from"] == '[["a.safetensors", 1.0], ["b.safetensors", 1.0]]'
    assert not caplog.records
    merge([a, lora(tmp_path / "d.safetensors")], [], tmp_path / "e.safetensors")
    assert "different indices (control_index=0,target_index=1 and None)" in caplog.text or (
        "different indices (None and control_index=0,target_index=1)" in caplog.text
    )
    assert "ss_one_frame" not in read_lora(tmp_path / "e.safetensors").metadata


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_resizing_gives_the_best_approximation_of_the_rank(rank, tmp_path):
    path = lora(tmp_path / "a.safetensors", rank=6, alpha=2.5)
    resize(path, tmp_path / "b.safetensors", rank)
    found = changes((tmp_path / "b.safetensors", 1.0))
    for name, change in changes((path, 1.0)).items():
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        assert_close(found[name], (u[:, :rank] * s[:rank]) @ v[:rank], rtol=1e-4, atol=1e-5)
    modules = read_lora(tmp_path / "b.safetensors").modules.values()
    assert {module.rank for module in modules} == {rank}


def test_resizing_leaves_smaller_modules_and_differences_as_they_are(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = lora(tmp_path / "a.safetensors", **{f"{Q}.diff_b": torch.randn(12)})
    before = load_file(path)
    for rank in (3, 8):
        resize(path, tmp_path / f"{rank}.safetensors", rank)
        after = load_file(tmp_path / f"{rank}.safetensors")
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    resize(path, tmp_path / "c.safetensors", 2)
    assert torch.equal(load_file(tmp_path / "c.safetensors")[f"{Q}.diff_b"], before[f"{Q}.diff_b"])
    kept = {}
    for name, change in changes((path, 1.0)).items():
        s = torch.linalg.svdvals(change)
        kept[NAMES[name]] = 100 * float(s[:2].norm() / s.norm())
    worst, mean = min(kept, key=kept.get), sum(kept.values()) / 2
    assert f"on average {mean:.1f} % of each change is kept, at least {kept[worst]:.1f} % ({worst})" in caplog.text


def test_a_rank_above_the_sides_of_a_matrix_shrinks_to_them(tmp_path):
    path = lora(tmp_path / "a.safetensors", rank=40)
    resize(path, tmp_path / "b.safetensors", 30)
    for name, change in changes((path, 1.0)).items():
        assert rel_l2(changes((tmp_path / "b.safetensors", 1.0))[name], change) < 1e-5
    modules = read_lora(tmp_path / "b.safetensors").modules
    assert {name: module.rank for name, module in modules.items()} == {Q: 8, FFN: 12}


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr_full"])
def test_resizing_makes_loha_and_lokr_a_lora(kind, tmp_path):
    draw = torch.Generator().manual_seed(0)
    shapes = {
        "loha": {"hada_w1_a": (12, 2), "hada_w1_b": (2, 8), "hada_w2_a": (12, 2), "hada_w2_b": (2, 8)},
        "lokr": {"lokr_w1": (3, 2), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 4)},
        "lokr_full": {"lokr_w1": (3, 2), "lokr_w2": (4, 4)},
    }[kind]
    parts = {f"{Q}.{part}": torch.randn(shape, generator=draw) for part, shape in shapes.items()}
    path = lora(tmp_path / "a.safetensors", names=(), **parts, **{f"{Q}.alpha": torch.tensor(0.5)})
    resize(path, tmp_path / "b.safetensors", 8)
    name = "blocks.0.self_attn.q.weight"
    assert rel_l2(changes((tmp_path / "b.safetensors", 1.0))[name], changes((path, 1.0))[name]) < 1e-5
    assert read_lora(tmp_path / "b.safetensors").modules[Q].parts.keys() == {"lora_down.weight", "lora_up.weight"}


def test_the_randomised_svd_is_near_the_best_one_and_repeats_itself():
    matrix = torch.randn(150, 90, generator=torch.Generator().manual_seed(0))  # a flat spectrum, the hardest case
    down, up = truncated(matrix, 20)
    best = torch.linalg.svdvals(matrix)[20:].norm()
    assert best <= (matrix - up @ down).norm() < 1.01 * best
    state = torch.random.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(truncated(matrix, 20), (down, up), strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)


def tuned_pair(folder, rename=str):
    """A checkpoint, and one with changes of rank 2 in two matrices, and others in a bias, a norm and a modulation."""
    base = {name: tensor.clone() for name, tensor in random_dit().state_dict().items()}
    tuned, draw = dict(base), torch.Generator().manual_seed(1)
    for name in ("blocks.0.self_attn.q.weight", "blocks.3.ffn.2.weight"):
        out, inputs = base[name].shape
        product = torch.randn(out, 2, generator=draw) @ torch.randn(2, inputs, generator=draw)
        tuned[name] = base[name] + 0.1 * product
    for name in ("blocks.0.self_attn.q.bias", "blocks.1.norm3.weight", "blocks.2.modulation", "patch_embedding.weight"):
        tuned[name] = base[name] + torch.randn(base[name].shape, generator=draw)
    save_file(base, folder / "base.safetensors")
    save_file({rename(name): tensor for name, tensor in tuned.items()}, folder / "tuned.safetensors")
    return base, tuned


@pytest.mark.parametrize("rename", [str, lambda name: f"model.diffusion_model.{name}", theirs])
def test_an_extracted_lora_turns_the_one_checkpoint_into_the_other(rename, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    base, tuned = tuned_pair(tmp_path, rename)
    extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "lora.safetensors", 2)
    merger = Merger([(read_lora(tmp_path / "lora.safetensors"), 1.0)], {k: tuple(t.shape) for k, t in base.items()})
    for name, tensor in tuned.items():
        assert_close(merger(name, base[name]), tensor, atol=1e-5, rtol=1e-5)
        assert torch.equal(tensor, base[name]) == torch.equal(merger(name, base[name]), base[name]), name
    assert "merged 5 of 5 modules" in merger.report()[0]
    assert "rank 2 keeps 100.0 % of the difference" in caplog.text
    tensors = load_file(tmp_path / "lora.safetensors")
    assert tensors["lora_unet_blocks_3_ffn_2.lora_down.weight"].shape == (2, SPEC.ffn_dim)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda base, tuned: base, "equals BASE"),
        (lambda base, tuned: {"x.weight": torch.ones(1)}, "is not a Wan DiT"),
        (lambda base, tuned: tuned | {"extra": torch.ones(1)}, r"another kind of model than BASE, e.g. in extra"),
        (lambda base, tuned: {k: t.to(torch.float8_e4m3fn) for k, t in tuned.items()}, "in 8 bits"),
        (lambda base, tuned: {k: t * torch.inf for k, t in tuned.items()}, "differs by NaN or infinity"),
    ],
)
def test_checkpoints_without_a_sensible_difference_are_refused(change, message, tmp_path):
    save_file(change(*tuned_pair(tmp_path)), tmp_path / "tuned.safetensors")
    with pytest.raises(ConfigError, match=rf"TUNED .*{message}"):
        extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "lora.safetensors", 2)
    assert not (tmp_path / "lora.safetensors").exists()


def test_inspect_tells_what_a_file_holds(tmp_path):
    settings = {"ss_one_frame": "control_index=0,target_index=5", "ss_learning_rate": "0.0001", "ss_seed": "None"}
    extra = {f"{Q}.diff_b": torch.ones(12), "lora_unet_vace_0.diff": torch.full((3, 4), 2.0)}
    path = lora(tmp_path / "a.safetensors", metadata=settings | {"ss_\x1b": "y" * 10**6}, **extra)
    lines = inspect(path)
    sizes = {name: float(change.norm()) for name, change in changes((path, 1.0)).items()}
    assert lines[:5] == [
        f"{path}: form musubi, 3 modules",
        "holds LoRA x 2, difference of a bias x 1, difference of a weight x 1",
        "rank 3, alpha 2",
        "2 of 3 modules are in Wan2.1 i2v, in 2 blocks; not in it: lora_unet_vace_0",
        "||dW|| per module: mean, largest",
    ]
    found = {line.split("  ")[1]: float(line.split()[-1]) for line in lines[5:8]}
    assert found == pytest.approx(
        {
            "ffn.0": sizes["blocks.1.ffn.0.weight"],
            "other modules": 48**0.5,
            "self_attn.q": sizes["blocks.0.self_attn.q.weight"],
        },
        rel=1e-3,
    )
    assert lines[8] == "time indices: control_index=0,target_index=5"
    assert "ss_learning_rate: 0.0001" in lines and not any("ss_seed" in line for line in lines)
    assert all(line.isprintable() and len(line) < 400 for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("convert a.safetensors b.safetensors --to musubi", "OUT b.safetensors: exists already"),
        ("convert a.safetensors c --to musubi", "OUT c: must end with .safetensors; try c.safetensors"),
        ("convert a.safetensors a.safetensors/c.safetensors --to musubi", "cannot write there"),
        ("convert a.safetensors c.safetensors --to comfy", r"invalid choice: 'comfy' \(choose from"),
        ("convert a.safetensors c.safetensors", "required: --to"),
        ("convert none.safetensors c.safetensors --to musubi", "SOURCE none.safetensors: does not exist"),
        ("inspect .", "FILE .: is a folder, not a file"),
        ("inspect cut.safetensors", "is not a readable safetensors file"),
        ("merge a.safetensors b.safetensors", "OUT b.safetensors: exists already"),
        ("merge a.safetensors c.safetensors --multiplier 1 2", "--multiplier: 2 numbers for 1 file;"),
        ("merge a.safetensors c.safetensors --multiplier nan", "--multiplier nan: must be numbers"),
        ("merge a.safetensors other.safetensors c.safetensors", f"{FFN} is of another size"),
        ("merge loha.safetensors c.safetensors", f"{Q} is a LoHa or LoKr"),
        ("resize a.safetensors c.safetensors --rank 0", "--rank 0: must be 1 or more"),
        ("resize a.safetensors c.safetensors --rank 2 --device warp", "--device warp: "),
        ("extract a.safetensors b.safetensors c.safetensors --rank 2", "BASE a.safetensors: is not a Wan DiT"),
        ("extract none.safetensors b.safetensors c.safetensors --rank 2", "BASE none.safetensors: does not exist"),
        ("shrink a.safetensors", "invalid choice: 'shrink'"),
        ("", "required: COMMAND"),
    ],
)
def test_mistakes_are_told_in_one_line_and_cost_no_file(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = lora(Path("a.safetensors")).read_bytes()
    shutil.copy("a.safetensors", "b.safetensors")
    Path("cut.safetensors").write_bytes(before[:200])
    lora(Path("other.safetensors"), names=(), **{f"{FFN}.diff": torch.ones(4, 4)})
    lora(Path("loha.safetensors"), names=(), **{f"{Q}.lokr_w1": torch.ones(3, 2), f"{Q}.lokr_w2": torch.ones(4, 4)})
    names = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ConfigError, match=message) as error:
        wan_lora.main(shlex.split(arguments))
    assert len(str(error.value).splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes() == before


def test_a_full_disk_leaves_no_half_adapter(tmp_path, monkeypatch):
    path = lora(tmp_path / "a.safetensors")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        wan_lora.main(["convert", str(path), str(tmp_path / "adapter"), "--to", "peft"])
    assert list((tmp_path / "adapter").iterdir()) == []


class Killed(BaseException):
    """Ends a conversion with no clean-up, as SIGKILL does."""


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_conversion_to_peft_killed_before_any_rename_can_be_repeated(renames, tmp_path, monkeypatch):
    command = ["convert", str(lora(tmp_path / "a.safetensors")), str(tmp_path / "adapter"), "--to", "peft"]
    rename, left = Path.replace, iter(range(renames))

    def replace(path, target):
        if next(left, None) is None:
            raise Killed
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.replace", replace)
        patched.setattr("pathlib.Path.unlink", lambda *_, **__: None)
        with pytest.raises(Killed):
            wan_lora.main(command)
    wan_lora.main(command)
    whole = read_lora(tmp_path / "adapter").modules
    assert [module.scale for module in whole.values()] == [
        module.scale for module in read_lora(tmp_path / "a.safetensors").modules.values()
    ]
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_the_documented_commands_run_as_they_stand(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("models", "output"):
        Path(folder).mkdir()
    tuned_pair(Path("models"))
    Path("models/base.safetensors").rename("models/wan2.1_i2v_480p_14B_bf16.safetensors")
    lora(Path("output/my-lora.safetensors"))
    lora(Path("output/other-lora.safetensors"), seed=1)
    lora(Path("output/my-lora-step00000015.safetensors"), seed=2)
    blocks = re.findall(r"```bash\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    commands = [shlex.split(line) for line in "".join(blocks).splitlines() if "wan_lora.py" in line]
    assert {words[2] for words in commands} == {"convert", "inspect", "merge", "ema", "extract", "resize"}
    for words in commands:
        assert words[:2] == ["python", "wan_lora.py"]
        wan_lora.main(words[2:])
    assert "2 of 2 modules are in Wan2.1 i2v" in capsys.readouterr().out
    made = {path.name for path in Path("output").iterdir()}
    assert made >= {"my-lora-comfyui.safetensors", "my-lora-peft", "both.safetensors", "tuned-lora.safetensors"}
