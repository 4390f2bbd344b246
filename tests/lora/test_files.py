"""LoRA files: the reference's merged output, what is read, written and refused."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from tests.helpers import golden, golden_path, rel_l2
from tests.lora_models import config, shapes_of, toy, trained
from utils.errors import ConfigError
from wan.files.dit_names import lora_name
from wan.files.load import load_dit
from wan.lora.files import read_lora
from wan.lora.merge import Merger, check_lora
from wan.lora.module import add_delta, weight_delta
from wan.lora.network import inject_lora_, save_lora
from wan.nets.conditioning import Conditioning
from wan.nets.context import pad_text


@pytest.mark.parametrize("multiplier", [1, 0.6])
def test_a_merged_file_gives_the_recorded_output(tiny, multiplier):
    case = golden("dit_i2v")
    shapes = {name: tensor.shape for name, tensor in load_file(tiny["i2v"]).items()}
    merger = Merger([(read_lora(golden_path("lora_musubi_format.safetensors")), multiplier)], shapes)
    model = load_dit(tiny["i2v"], torch.float32, "cpu", merge=lambda n, w: merger(n, w.float())).eval()
    with torch.no_grad():
        out = model(
            case["x0"][None],
            Conditioning(case["y0"][None], case["clip_fea"][:1, None]),
            case["t"][:1],
            pad_text([case["context0"]]),
            torch.tensor([[0, 8]]),
        )
    assert rel_l2(out[0], golden("lora_merge")[f"out0_f_0_8_lora_{multiplier}"]) < 1e-5
    (line,) = merger.report()
    assert line.startswith(f"lora_musubi_format.safetensors x {multiplier:g}: merged 36 of 36 modules, ||dW||/||W|| = ")


def test_the_merge_follows_its_formula_in_float32():
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 4, generator=random).bfloat16()
    down, up = torch.randn(2, 4, generator=random), torch.randn(5, 2, generator=random)
    change = weight_delta({"lora_down.weight": down.bfloat16(), "lora_up.weight": up.bfloat16()}, 0.3)
    assert change.dtype == torch.float32
    assert_close(change.double(), 0.3 * up.bfloat16().double() @ down.bfloat16().double(), atol=1e-6, rtol=1e-6)
    merged = add_delta(weight, change)
    assert merged.dtype == torch.bfloat16
    assert_close(merged.double(), weight.double() + change.double(), atol=0, rtol=2**-8)
    assert_close(add_delta(weight.float(), change).double(), weight.double() + change.double(), atol=1e-6, rtol=1e-6)
    assert add_delta(weight.to(torch.float8_e4m3fn), change).dtype == torch.float8_e4m3fn


def test_loha_and_lokr_change_weights_by_their_formulas():
    random = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=random)

    a, b, c, d = draw(6, 2), draw(2, 4), draw(6, 2), draw(2, 4)
    loha = weight_delta({"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}, 0.5)
    entry = 0.5 * sum(a[5, r] * b[r, 3] for r in range(2)) * sum(c[5, r] * d[r, 3] for r in range(2))
    assert loha.shape == (6, 4)
    assert_close(loha[5, 3], entry)

    w1, w2_a, w2_b = draw(3, 2), draw(2, 1), draw(1, 4)
    lokr = weight_delta({"lokr_w1": w1, "lokr_w2_a": w2_a, "lokr_w2_b": w2_b}, 0.5)
    assert lokr.shape == (6, 8)
    assert_close(lokr[2 * 2 + 1, 1 * 4 + 3], 0.5 * w1[2, 1] * w2_a[1, 0] * w2_b[0, 3])
    assert_close(lokr, weight_delta({"lokr_w1_a": w1, "lokr_w1_b": torch.eye(2), "lokr_w2": w2_a @ w2_b}, 0.5))


def test_several_files_add_up_with_their_multipliers(tmp_path):
    base, first, second = toy(), toy(), toy()
    save_lora(tmp_path / "a.safetensors", trained(first), {})
    save_lora(tmp_path / "b.safetensors", trained(second, 2, 4.0), {})
    a, b = read_lora(tmp_path / "a.safetensors"), read_lora(tmp_path / "b.safetensors")
    name, weight = "blocks.1.ffn.0.weight", base.state_dict()["blocks.1.ffn.0.weight"]
    expected = weight.double()
    for file, scale in ((a, 0.5 * 2 / 3), (b, -1.0 * 4 / 2)):
        down, up = file.modules[lora_name("blocks.1.ffn.0")].parts.values()
        expected = expected + scale * up.double() @ down.double()
    merger = Merger([(a, 0.5), (b, -1.0)], shapes_of(base))
    assert_close(merger(name, weight).double(), expected, atol=1e-6, rtol=1e-6)
    untouched = base.state_dict()["img_emb.weight"]
    assert torch.equal(merger("img_emb.weight", untouched), untouched)
    assert [line.split(",")[0] for line in merger.report()] == [
        "a.safetensors x 0.5: merged 1 of 2 modules",
        "b.safetensors x -1: merged 1 of 2 modules",
    ]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_saved_file_holds_the_network_under_the_documented_keys(dtype, tmp_path):
    network = trained(toy())
    save_lora(tmp_path / "lora.safetensors", network, {"ss_network_dim": "3"}, dtype)
    tensors = load_file(tmp_path / "lora.safetensors")
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        f"lora_unet_blocks_{block}_ffn_0.{part}": shape
        for block in range(2)
        for part, shape in (("lora_down.weight", (3, 6)), ("lora_up.weight", (10, 3)), ("alpha", ()))
    }
    assert {tensor.dtype for tensor in tensors.values()} == {dtype or torch.float32}
    other = inject_lora_(toy(), config())
    other.load_state_dict(tensors)
    for key, tensor in network.state_dict(dtype).items():
        assert torch.equal(other.state_dict(dtype)[key], tensor), key


def test_the_hashes_are_those_of_the_file_with_training_metadata_alone(tmp_path):
    """Recomputed from two files, the real one and one with `ss_` keys only; over 1 MiB, so that both see data."""
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(3000, 200)])
    network = trained(model, 120)
    path, plain = tmp_path / "lora.safetensors", tmp_path / "plain.safetensors"
    save_lora(path, network, {"ss_steps": "7", "modelspec.title": "x" * 100})
    save_file(load_file(path), plain, {"ss_steps": "7"})

    def header_and_data(file):
        content = file.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        return json.loads(content[8:end])["__metadata__"], content[end:]

    metadata, data = header_and_data(path)
    assert metadata["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    window = plain.read_bytes()[0x100000 : 0x100000 + 0x10000]
    assert len(window) == 0x10000
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(window).hexdigest()[:8]
    assert metadata["modelspec.title"] == "x" * 100
    assert read_lora(path).metadata == metadata


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_a_missing_or_zero_alpha_means_the_rank(alpha, tmp_path):
    tensors = {"lora_unet_a.lora_down.weight": torch.ones(3, 4), "lora_unet_a.lora_up.weight": torch.ones(5, 3)}
    if alpha is not None:
        tensors["lora_unet_a.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "lora.safetensors")
    merger = Merger([(read_lora(tmp_path / "lora.safetensors"), 1.0)], {"a.weight": (5, 4)})
    assert torch.equal(merger("a.weight", torch.zeros(5, 4)), torch.full((5, 4), 3.0))


@pytest.mark.parametrize(
    ("parts", "rank", "scale"),
    [
        ({"w1": (3, 2), "w2_a": (2, 4), "w2_b": (4, 5)}, 4, 0.5),
        ({"w1_a": (3, 4), "w1_b": (4, 2), "w2": (2, 5)}, 4, 0.5),
        ({"w1": (3, 2), "w2": (2, 5)}, None, 1.0),
    ],
)
def test_the_scale_of_a_lokr_is_alpha_by_rank_or_1_for_two_full_matrices(parts, rank, scale, tmp_path):
    tensors = {f"lora_unet_a.lokr_{part}": torch.ones(shape) for part, shape in parts.items()}
    save_file(tensors | {"lora_unet_a.alpha": torch.tensor(2.0)}, tmp_path / "lora.safetensors")
    module = read_lora(tmp_path / "lora.safetensors").modules["lora_unet_a"]
    assert (module.shape, module.rank, module.scale) == ((6, 10), rank, scale)


PAIR = {"lora_down.weight": (3, 4), "lora_up.weight": (5, 3)}
UNEQUAL = {"w1_a": (3, 2), "w1_b": (2, 3), "w2_a": (3, 1), "w2_b": (1, 3)}
HADAMARD = {"hada_w1_a": (3, 2), "hada_w1_b": (2, 4), "hada_w2_a": (3, 2), "hada_w2_b": (2, 4)}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"lora_unet_blocks_0_ffn_0.dora_scale": (3, 1)}, "is not a LoRA"),
        ({"lora_te_text_model.lora_up.weight": (3, 4)}, "'lora_te_text_model.lora_up.weight' is not a key"),
        ({"blocks.0.ffn.0.weight": (3, 4)}, "'blocks.0.ffn.0.weight' is not a key"),
        ({"lora_unet_a.lora_down.weight": (3, 4)}, "lora_unet_a is not a LoRA"),
        ({"lora_unet_a.lora_down.weight": (3, 4), "lora_unet_a.lora_up.weight": (5, 2)}, "lora_unet_a is not a LoRA"),
        ({"lora_unet_a.lora_down.weight": (0, 4), "lora_unet_a.lora_up.weight": (5, 0)}, "lora_unet_a is not a LoRA"),
        ({f"lora_unet_a.{part}": (*shape, 2, 2) for part, shape in PAIR.items()}, "lora_unet_a is not a LoRA"),
        ({f"lora_unet_a.{part}": shape for part, shape in PAIR.items()} | {"lora_unet_a.alpha": (2,)}, "is not a LoRA"),
        (
            {f"lora_unet_a.{part}": shape for part, shape in PAIR.items()} | {"lora_unet_a.lokr_w1": (2, 2)},
            "is not a LoRA",
        ),
        ({"lora_unet_a.hada_w1_a": (3, 2), "lora_unet_a.hada_w1_b": (2, 4)}, "is not a LoRA"),
        ({f"lora_unet_a.{part}": shape for part, shape in (HADAMARD | {"hada_w2_a": (4, 2)}).items()}, "is not a LoRA"),
        ({f"lora_unet_a.{part}": (2, 2) for part in ("lokr_w1", "lokr_w2", "lora_up.weight")}, "is not a LoRA"),
        ({f"lora_unet_a.lokr_{part}": shape for part, shape in UNEQUAL.items()}, "is not a LoRA"),
        ({"lora_unet_a.lokr_w1": (3, 4)}, "is not a LoRA"),
        ({"lora_unet_a.lokr_w1": (3, 4), "lora_unet_a.lokr_w2": (3, 4, 1, 1)}, "is not a LoRA"),
        ({f"lora_unet_a.{part}": (2, 2) for part in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2")}, "is not a LoRA"),
        ({"lora_unet_a.lokr_t2": (3, 4)}, "'lora_unet_a.lokr_t2' is not a key"),
        ({}, "holds no tensors"),
    ],
)
def test_files_of_another_kind_are_refused_by_name(shapes, message, tmp_path):
    save_file({key: torch.ones(shape) for key, shape in shapes.items()}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=rf"^--lora_weight .*other.safetensors: .*{message}"):
        read_lora(tmp_path / "other.safetensors")


def test_a_damaged_or_missing_file_is_refused_by_name(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ConfigError, match=r"--lora_weight .*cut.safetensors: is not a readable safetensors file"):
        read_lora(tmp_path / "cut.safetensors")
    with pytest.raises(ConfigError, match=r"--network_weights .*none.safetensors: does not exist"):
        read_lora(tmp_path / "none.safetensors", "--network_weights")


def test_a_file_without_a_counterpart_or_of_another_size_is_refused(tmp_path):
    save_lora(tmp_path / "lora.safetensors", trained(toy()), {})
    lora = read_lora(tmp_path / "lora.safetensors")
    with pytest.raises(ConfigError, match=r"none of its 2 modules is in the model, .* lora_unet_blocks_0_ffn_0"):
        Merger([(lora, 1.0)], {"model.diffusion_model.blocks.0.ffn.0.weight": (10, 6)})
    with pytest.raises(ConfigError, match=r"blocks_1_ffn_0 is for a weight \[10, 6\], the model has \[9, 6\]"):
        Merger([(lora, 1.0)], {"blocks.0.ffn.0.weight": (10, 6), "blocks.1.ffn.0.weight": (9, 6)})
    match = check_lora(lora, {"blocks.0.ffn.0.weight": (10, 6), "blocks.0.ffn.0.bias": (10,)})
    assert match.weights == {"blocks.0.ffn.0.weight": "lora_unet_blocks_0_ffn_0"}
    assert match.unmatched == ("lora_unet_blocks_1_ffn_0",)
    assert "not in this model: 1, e.g. lora_unet_blocks_1_ffn_0" in str(
        Merger([(lora, 1.0)], {"blocks.0.ffn.0.weight": (10, 6)}).report()
    )


def test_a_full_disk_is_an_os_error_and_leaves_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "lora.safetensors"
    save_lora(path, trained(toy()), {"ss_steps": "1"})
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr("pathlib.Path.write_bytes", full)
        save_lora(path, trained(toy()), {"ss_steps": "2"})
    assert [found.name for found in tmp_path.iterdir()] == [path.name] and path.read_bytes() == before
