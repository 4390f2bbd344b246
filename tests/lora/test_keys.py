"""LoRA key names: every dialect is read and written without a change, and other tools do with ours what we do."""

import json
import math

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders import lora_conversion_utils
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from tests.dit_cases import SPEC, all_rows, arguments, random_dit, velocity
from tests.helpers import manifest, rel_l2
from tests.nets.test_dit import DIFFUSERS_NAMES
from utils.errors import ConfigError
from wan.files.dit_names import diffusers_name, dotted_name, lora_name
from wan.frames.layout import OneFrameLayout
from wan.lora.files import parse_lora, read_lora
from wan.lora.keys import DIALECTS
from wan.lora.merge import Merger
from wan.lora.tools import convert
from wan.lora.trained_for import layout_from_metadata, size_from_metadata
from wan.nets.dit import WanDiT
from wan.nets.spec import DiTSpec

LINEAR = [
    *(
        f"blocks.{i}.{attention}.{name}"
        for i in range(4)
        for attention in ("self_attn", "cross_attn")
        for name in "qkvo"
    ),
    *(f"blocks.{i}.{name}" for i in range(4) for name in ("cross_attn.k_img", "cross_attn.v_img", "ffn.0", "ffn.2")),
]


def draw(generator, *shape, size=0.15):
    return torch.randn(*shape, generator=generator) * size


def lora_tensors(alpha=lambda i: 3.0, rank=lambda i: 2 + i % 3, names=LINEAR, prefix="", parts=("lora_A", "lora_B")):
    """A LoRA on the linear layers of the model of dit_cases, under official names with dots."""
    shapes, generator, tensors = model_shapes(), torch.Generator().manual_seed(5), {}
    for i, name in enumerate(names):
        out, inputs = shapes[f"{name}.weight"]
        tensors[f"{prefix}{name}.{parts[0]}.weight"] = draw(generator, rank(i), inputs)
        tensors[f"{prefix}{name}.{parts[1]}.weight"] = draw(generator, out, rank(i))
        if alpha(i) is not None:
            tensors[f"{prefix}{name}.alpha"] = torch.tensor(alpha(i))
    return tensors


def distilled_tensors(alpha=None, prefix="diffusion_model."):
    """As few-step LoRAs are: low-rank weights, changes of biases, and full ones of norms, a head and a modulation."""
    shapes, generator = model_shapes(), torch.Generator().manual_seed(6)
    tensors = lora_tensors(lambda i: alpha, lambda i: 4, prefix=prefix, parts=("lora_down", "lora_up"))
    for name in LINEAR:
        tensors[f"{prefix}{name}.diff_b"] = draw(generator, *shapes[f"{name}.bias"])
    for name in ("head.head", "patch_embedding"):
        tensors |= {f"{prefix}{name}.diff": draw(generator, *shapes[f"{name}.weight"])}
        tensors |= {f"{prefix}{name}.diff_b": draw(generator, *shapes[f"{name}.bias"])}
    norms = {f"{prefix}blocks.1.self_attn.norm_k.diff": draw(generator, *shapes["blocks.1.self_attn.norm_k.weight"])}
    norms |= {f"{prefix}blocks.1.norm3.diff_b": draw(generator, *shapes["blocks.1.norm3.bias"])}
    return tensors, norms | {f"{prefix}blocks.2.diff_m": draw(generator, *shapes["blocks.2.modulation"])}


def model_shapes():
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in WanDiT(SPEC).state_dict().items()}


def saved(tensors, path, metadata=None):
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, metadata)
    return path


def changes(path):
    """What a file adds to each parameter of the model."""
    shapes = model_shapes()
    merger = Merger([(read_lora(path), 1.0)], shapes)
    found = {name: merger(name, torch.zeros(shape)) for name, shape in shapes.items()}
    return {name: change for name, change in found.items() if change.any()}


def assert_same_changes(path, other):
    first, second = changes(path), changes(other)
    assert first.keys() == second.keys() and len(first) >= 48
    for name, change in first.items():
        assert torch.equal(change, second[name]), name


def merged(path, multiplier=1.0):
    """Our model with a file merged into its weights."""
    model = random_dit()
    merger = Merger([(read_lora(path), multiplier)], model_shapes())
    model.load_state_dict({name: merger(name, tensor) for name, tensor in model.state_dict().items()})
    return model


def in_diffusers():
    """The weights of our model in diffusers' class."""
    other = WanTransformer3DModel(
        num_attention_heads=SPEC.num_heads,
        in_channels=SPEC.in_dim,
        text_dim=SPEC.text_dim,
        ffn_dim=SPEC.ffn_dim,
        num_layers=SPEC.num_layers,
        image_dim=SPEC.image_dim,
        added_kv_proj_dim=SPEC.dim,
    )
    other.load_state_dict({theirs(name): tensor for name, tensor in random_dit().state_dict().items()}, strict=True)
    return other.eval()


def theirs(name):
    for ours, other in DIFFUSERS_NAMES:
        name = name.replace(ours, other)
    return name


@torch.no_grad()
def outputs(other):
    """Of diffusers' model, plain or wrapped by PEFT; frame indices 0 and 1, which are its own."""
    latents, (channels, clip, _), timesteps, text, _ = arguments()
    inputs = torch.cat([latents, channels], 1), timesteps, all_rows(text), clip.flatten(0, 1)
    return other(*inputs, return_dict=False)[0]


@torch.no_grad()
def our_output(model):
    return model(*arguments()[:-1], torch.tensor([[0, 1]]))


@pytest.mark.parametrize("kind", ["i2v", "flf2v", "t2v"])
def test_every_module_with_weights_has_its_name_here_and_in_diffusers(kind):
    inputs, image = (16, None) if kind == "t2v" else (36, 48)
    with torch.device("meta"):
        state = WanDiT(DiTSpec(kind, 256, 320, num_layers=11, in_dim=inputs, text_dim=32, image_dim=image)).state_dict()
    assert_all_names_known(state)
    for name in state:
        parent, _, leaf = name.rpartition(".")
        if leaf in ("weight", "bias"):
            assert f"{diffusers_name(parent)}.{leaf}" == theirs(name)
            assert dotted_name(lora_name(diffusers_name(parent))) == parent


@pytest.mark.parametrize("name", ["t2v-1.3B", "t2v-14B", "i2v-14B", "flf2v-14B"])
def test_every_module_of_a_published_checkpoint_is_known(name):
    assert_all_names_known(manifest(f"dit_{name}"))


def assert_all_names_known(names):
    for name in names:
        parent, _, leaf = name.rpartition(".")
        assert leaf == "emb_pos" or dotted_name(lora_name(parent)) == parent, name


@pytest.mark.parametrize("second", DIALECTS)
@pytest.mark.parametrize("first", DIALECTS)
def test_a_round_trip_through_two_dialects_changes_no_bit_of_what_is_merged(first, second, tmp_path):
    tensors = lora_tensors(lambda i: [None, 2.0, 1.1][i % 3], lambda i: 2 + i % 4)
    source = saved({f"diffusion_model.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "in.safetensors")
    one, two, back = (tmp_path / name for name in ("one", "two", "back.safetensors"))
    one, two = (
        path if to == "peft" else path.with_suffix(".safetensors") for path, to in ((one, first), (two, second))
    )
    for here, there, to in ((source, one, first), (one, two, second), (two, back, "musubi")):
        convert(here, there, to)
        assert_same_changes(source, there)
    assert read_lora(one).dialect == first and read_lora(two).dialect == second


def test_musubi_and_comfyui_files_become_each_other_with_the_same_tensors(tmp_path):
    tensors = {f"diffusion_model.{key}": tensor for key, tensor in lora_tensors(lambda i: 1.1).items()}
    source = saved(tensors, tmp_path / "in.safetensors", {"ss_one_frame": "control_index=0,target_index=1"})
    convert(source, tmp_path / "musubi.safetensors", "musubi")
    convert(tmp_path / "musubi.safetensors", tmp_path / "back.safetensors", "comfyui")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in tensors.items())
    metadata = read_lora(tmp_path / "back.safetensors").metadata
    assert metadata["ss_one_frame"] == "control_index=0,target_index=1" and metadata["ss_network_dim"] == "Dynamic"


def test_the_dtype_of_a_file_stays(tmp_path):
    half = {f"{key}": tensor.bfloat16() for key, tensor in lora_tensors(lambda i: 2.0, lambda i: 4).items()}
    source = saved({f"transformer.{key}": tensor for key, tensor in half.items()}, tmp_path / "in.safetensors")
    for to in ("musubi", "comfyui", "diffusers"):
        convert(source, tmp_path / f"{to}.safetensors", to)
        tensors = load_file(tmp_path / f"{to}.safetensors")
        assert {t.dtype for key, t in tensors.items() if not key.endswith("alpha")} == {torch.bfloat16}
        assert_same_changes(source, tmp_path / f"{to}.safetensors")


@pytest.mark.parametrize(
    ("prefix", "parts", "dialect", "rename"),
    [
        ("", ("lora_A.default", "lora_B.default"), "unprefixed", str),
        ("transformer.", ("lora.down", "lora.up"), "diffusers", theirs),
        ("transformer.", ("lora_A", "lora_B"), "diffusers", str),
        ("model.diffusion_model.", ("lora_down", "lora_up"), "comfyui", str),
        ("base_model.model.transformer.", ("lora_A", "lora_B"), "peft", theirs),
        ("lora_unet_", ("lora_down", "lora_up"), "musubi", lambda name: name.replace(".", "_")),
        ("lora_unet_", ("lora_down", "lora_up"), "musubi", lambda name: theirs(name).replace(".", "_")),
        ("lora_unet__", ("lora_down", "lora_up"), "videox-fun", lambda name: name.replace(".", "_")),
        ("lycoris_", ("lora_down", "lora_up"), "lycoris", lambda name: theirs(name).replace(".", "_")),
        ("pipe.dit.", ("lora_A.default", "lora_B.default"), "diffsynth", str),
    ],
)
def test_all_ways_to_write_the_same_lora_are_read_as_the_same(prefix, parts, dialect, rename, tmp_path):
    source = saved(lora_tensors(), tmp_path / "plain.safetensors")
    written = {}
    for key, tensor in lora_tensors(parts=parts).items():
        name = next(name for name in LINEAR if key.startswith(f"{name}."))
        renamed = rename(f"{name}.").removesuffix(".").removesuffix("_")
        written[f"{prefix}{renamed}{key.removeprefix(name)}"] = tensor
    path = saved(written, tmp_path / "other.safetensors")
    assert read_lora(path).dialect == dialect
    assert_same_changes(source, path)


@pytest.mark.parametrize("to", ["musubi", "comfyui"])
def test_diffusers_own_converters_read_our_files_as_we_do(to, tmp_path):
    source = saved(lora_tensors(lambda i: 1.1), tmp_path / "in.safetensors")
    convert(source, tmp_path / "out.safetensors", to)
    convert(source, tmp_path / "ours.safetensors", "diffusers")
    name = {
        "musubi": "_convert_musubi_wan_lora_to_diffusers",
        "comfyui": "_convert_non_diffusers_wan_lora_to_diffusers",
    }
    found = getattr(lora_conversion_utils, name[to])(load_file(tmp_path / "out.safetensors"))
    ours = read_lora(tmp_path / "ours.safetensors").modules
    theirs_read = parse_lora(found, "theirs")
    assert ours.keys() == theirs_read.keys() and len(ours) == 48
    for key, module in theirs_read.items():
        assert_close(module.delta(), ours[key].delta(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("alpha", "rank"), [(2.0, 4), (2.0, 3), (1.1, None)])
def test_a_file_in_diffusers_form_does_in_diffusers_what_it_does_here(alpha, rank, tmp_path):
    source = saved(lora_tensors(lambda i: alpha, lambda i: rank or 2 + i % 3), tmp_path / "in.safetensors")
    convert(source, tmp_path / "out.safetensors", "diffusers")
    assert ("lora_adapter_metadata" in read_lora(tmp_path / "out.safetensors").metadata) == (rank != 4)
    other = in_diffusers()
    assert rel_l2(outputs(other), our_output(random_dit())) < 1e-5
    other.load_lora_adapter(tmp_path, weight_name="out.safetensors")
    expected = our_output(merged(source))
    assert rel_l2(our_output(random_dit()), expected) > 0.01
    assert rel_l2(outputs(other), expected) < 1e-4


@pytest.mark.parametrize("alpha", [None, 1.1])
def test_a_distilled_lora_does_in_diffusers_what_it_does_here_but_for_norms(alpha, tmp_path, caplog):
    tensors, norms = distilled_tensors(alpha)
    source = saved(tensors, tmp_path / "in.safetensors")
    convert(source, tmp_path / "out.safetensors", "diffusers")
    assert not caplog.records
    other, expected = in_diffusers(), our_output(merged(source))
    other.load_lora_adapter(tmp_path, weight_name="out.safetensors")
    assert rel_l2(outputs(other), expected) < 1e-4
    convert(saved(tensors | norms, tmp_path / "all.safetensors"), tmp_path / "lossy.safetensors", "diffusers")
    assert "cannot carry 3 changes of norms and the like, e.g. blocks.1.norm3.diff_b" in caplog.text
    assert_same_changes(tmp_path / "lossy.safetensors", tmp_path / "out.safetensors")


@pytest.mark.parametrize("alpha", [2.0, 1.1])
def test_a_folder_in_pefts_form_does_in_peft_what_it_does_here(alpha, tmp_path):
    source = saved(lora_tensors(lambda i: alpha), tmp_path / "in.safetensors")
    convert(source, tmp_path / "adapter", "peft")
    other = PeftModel.from_pretrained(in_diffusers(), tmp_path / "adapter")
    assert rel_l2(outputs(other), our_output(merged(source))) < 1e-4


@pytest.mark.filterwarnings("ignore:.*invalid shape", "ignore:.*did not match any")  # biases; the pattern for none
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_bias": True}])
def test_what_peft_saves_does_here_what_it_does_there(options, tmp_path):
    """On our own model, with alphas that only the configuration tells."""
    patterns = {
        "rank_pattern": {"cross_attn.q": 3},
        "alpha_pattern": {"ffn.0": 7, "blocks.1.self_attn.k": 1, "attn.v": 9},
    }  # the last: none
    targets = [name for name in LINEAR if not name.endswith(".o")]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, **patterns, **options)
    model = get_peft_model(random_dit(), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(draw(generator, *parameter.shape))
    model.save_pretrained(tmp_path / "adapter")
    expected = our_output(model.eval())
    assert rel_l2(our_output(merged(tmp_path / "adapter")), expected) < 1e-4
    assert rel_l2(velocity(merged(tmp_path / "adapter", 0.5)), expected) > 1e-3


def test_what_diffusers_saves_does_here_what_it_does_there(tmp_path):
    other = in_diffusers()
    other.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "net.2"], init_lora_weights=False))
    config = other.peft_config["default"].to_dict() | {"target_modules": ["to_q", "net.2"]}
    tensors = {f"transformer.{k.replace('.default', '')}": t for k, t in other.state_dict().items() if "lora_" in k}
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()}, default=str)}
    path = saved({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / "lora.safetensors", metadata)
    assert {module.scale for module in read_lora(path).modules.values()} == {1.5}
    assert rel_l2(outputs(other), our_output(merged(path))) < 1e-4


@pytest.mark.parametrize("to", ["musubi", "comfyui"])
def test_differences_of_weights_biases_norms_and_modulations_are_added_to_them(to, tmp_path):
    tensors, norms = distilled_tensors()
    source = saved(tensors | norms, tmp_path / "in.safetensors")
    convert(source, tmp_path / "out.safetensors", to)
    found, prefix = changes(tmp_path / "out.safetensors"), "diffusion_model."
    assert read_lora(tmp_path / "out.safetensors").dialect == to
    assert "diffusion_model.blocks.2.modulation.diff" in load_file(tmp_path / "out.safetensors")  # for ComfyUI
    for name in LINEAR:
        assert torch.equal(found[f"{name}.bias"], tensors[f"{prefix}{name}.diff_b"])
    assert torch.equal(found["head.head.weight"], tensors[f"{prefix}head.head.diff"])
    assert torch.equal(found["patch_embedding.weight"], tensors[f"{prefix}patch_embedding.diff"])
    assert torch.equal(found["blocks.1.norm3.bias"], norms[f"{prefix}blocks.1.norm3.diff_b"])
    assert torch.equal(found["blocks.2.modulation"], norms[f"{prefix}blocks.2.diff_m"])
    assert len(found) == 2 * len(LINEAR) + 4 + 3
    half = Merger([(read_lora(source), -0.5)], model_shapes())
    name = "blocks.1.self_attn.norm_k.weight"
    assert torch.equal(half(name, torch.ones(SPEC.dim)), 1 - 0.5 * norms[f"{prefix}blocks.1.self_attn.norm_k.diff"])


def test_a_lora_of_a_convolution_is_merged_as_one(tmp_path):
    down, up = torch.randn(3, 36, 1, 2, 2), torch.randn(SPEC.dim, 3, 1, 1, 1)
    keys = ("diffusion_model.patch_embedding.lora_A.weight", "diffusion_model.patch_embedding.lora_B.weight")
    path = saved(dict(zip(keys, (down, up), strict=True)), tmp_path / "in.safetensors")
    change = Merger([(read_lora(path), 1.0)], model_shapes())(
        "patch_embedding.weight", torch.zeros(SPEC.dim, 36, 1, 2, 2)
    )
    assert_close(change, torch.einsum("or,rithw->oithw", up[..., 0, 0, 0], down))
    convert(path, tmp_path / "out.safetensors", "diffusers")
    other = in_diffusers()
    other.load_lora_adapter(tmp_path, weight_name="out.safetensors")
    assert rel_l2(outputs(other), our_output(merged(path))) < 1e-4


def test_loading_tells_what_was_merged_what_was_not_and_how_much_it_changes(tmp_path):
    tensors = {
        "diffusion_model.blocks.0.ffn.0.lora_A.weight": torch.full((1, 2), 3.0),
        "diffusion_model.blocks.0.ffn.0.lora_B.weight": torch.full((2, 1), 1.0),
        "diffusion_model.blocks.0.ffn.0.diff_b": torch.ones(2),
        "diffusion_model.blocks.0.ffn.2.diff_b": torch.ones(2),
        "diffusion_model.vace_blocks.0.ffn.0.diff_b": torch.ones(2),
    }
    path = saved(tensors, tmp_path / "in.safetensors")
    shapes = {"blocks.0.ffn.0.weight": (2, 2), "blocks.0.ffn.2.bias": (2,)}
    merger = Merger([(read_lora(path), 0.5), (read_lora(path), 1.0)], shapes)
    merger("blocks.0.ffn.0.weight", torch.full((2, 2), 4.0))
    merger("blocks.0.ffn.2.bias", torch.zeros(2))
    ratio = math.sqrt(4 * 1.5**2 + 2 * 0.5**2) / 8
    lost = "not in this model: 2, e.g. lora_unet_blocks_0_ffn_0.bias"
    assert merger.report() == [
        f"in.safetensors x 0.5: merged 2 of 3 modules, ||dW||/||W|| = {ratio:.2g}; {lost}",
        f"in.safetensors x 1: merged 2 of 3 modules, ||dW||/||W|| = {2 * ratio:.2g}; {lost}",
    ]


def test_a_lora_for_t2v_works_on_i2v_but_for_the_input_channels(tmp_path):
    first = {f"diffusion_model.patch_embedding.{part}": torch.ones(shape) for part, shape in FIRST_OF_T2V.items()}
    path = saved(
        first | {f"diffusion_model.{key}": tensor for key, tensor in lora_tensors().items()}, tmp_path / "a.safetensors"
    )
    merger = Merger([(read_lora(path), 1.0)], model_shapes())
    assert torch.equal(
        merger("patch_embedding.weight", torch.ones(SPEC.dim, 36, 1, 2, 2)), torch.ones(128, 36, 1, 2, 2)
    )
    assert torch.equal(merger("patch_embedding.bias", torch.ones(SPEC.dim)), torch.full((SPEC.dim,), 2.0))
    assert "not in this model: 1, e.g. lora_unet_patch_embedding.weight" in merger.report()[0]
    with pytest.raises(ConfigError, match=r"is for a weight \[128, 16, 1, 2, 2\], the model has \[64, 16, 1, 2, 2\]"):
        Merger([(read_lora(path), 1.0)], {"patch_embedding.weight": (64, 16, 1, 2, 2)})


def test_lohas_reach_comfyui_as_they_are_and_are_refused_by_pefts_forms(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = {"hada_w1_a": (128, 2), "hada_w1_b": (2, 128), "hada_w2_a": (128, 2), "hada_w2_b": (2, 128)}
    names = [f"lora_unet_blocks_{i}_self_attn_{name}" for i in range(4) for name in "qkvo"]
    tensors = {f"{name}.{part}": draw(generator, *shape) for name in names for part, shape in shapes.items()}
    source = saved(tensors | {f"{name}.alpha": torch.tensor(3.0) for name in names}, tmp_path / "in.safetensors")
    convert(source, tmp_path / "out.safetensors", "comfyui")
    assert "diffusion_model.blocks.3.self_attn.o.hada_w2_b" in load_file(tmp_path / "out.safetensors")
    first, second = changes(source), changes(tmp_path / "out.safetensors")
    assert len(first) == 16 and all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(ConfigError, match=r"has no LoHa and LoKr; make it a LoRA by 'wan_lora.py resize' first"):
        convert(source, tmp_path / "peft", "peft")


FIRST_OF_T2V = {"diff": (SPEC.dim, 16, 1, 2, 2), "diff_b": (SPEC.dim,)}
A, B = "diffusion_model.blocks.0.ffn.0.lora_A.weight", "diffusion_model.blocks.0.ffn.0.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "metadata", "message"),
    [
        ({A.replace("lora_A.weight", "dora_scale"): torch.ones(2, 1)}, {}, "is not a LoRA, LoHa, LoKr or difference"),
        ({A.replace("lora_A.weight", "dora_scale"): torch.ones(())}, {}, "is not a LoRA, LoHa, LoKr or difference"),
        ({"base_model.model.x.lora_magnitude_vector": torch.ones(5)}, {}, "is not a LoRA, LoHa, LoKr or difference"),
        ({"lora_unet_blocks_0_ffn_0.lora_down.weight": torch.ones(2, 4)}, {}, "there twice, under two names"),
        ({"transformer_2.blocks.0.ffn.0.lora_A.weight": torch.ones(2, 4)}, {}, "is not a key of a Wan LoRA"),
        ({"diffusion_model.blocks.0.ffn.0.weight": torch.ones(5, 4)}, {}, "is not a key of a Wan LoRA"),
        ({"\x1b[2J" + "y" * 10**6: torch.ones(1)}, {}, r"' \[2Jy{143}\.\.\.' is not a key of a Wan LoRA"),
        ({A: torch.full((2, 4), math.nan)}, {}, "lora_A.weight' holds NaN, infinity or whole numbers"),
        ({B: torch.ones(5, 2, dtype=torch.int8)}, {}, "lora_B.weight' holds NaN, infinity or whole numbers"),
        ({"diffusion_model.blocks.0.ffn.2.alpha": torch.ones(())}, {}, "is not a LoRA, LoHa, LoKr or difference"),
        ({"diffusion_model.blocks.0.ffn.2.lora_B.bias": torch.ones(5)}, {}, "is not a LoRA, LoHa, LoKr or difference"),
        (
            {A.replace("A.weight", "B.bias"): torch.ones(5), A.replace("lora_A.weight", "diff_b"): torch.ones(5)},
            {},
            "is not a LoRA, LoHa, LoKr or difference",
        ),
        ({}, {"lora_adapter_metadata": "[]"}, "is not a JSON object"),
        ({}, {"lora_adapter_metadata": "[" * 10**5}, "is not a JSON object"),
        ({}, {"lora_adapter_metadata": "{}"}, "has no usable lora_alpha"),
        ({}, {"lora_adapter_metadata": '{"transformer.lora_alpha": "Infinity"}'}, "has no usable lora_alpha"),
        ({}, {"lora_adapter_metadata": '{"transformer.lora_alpha": 1' + "0" * 400 + "}"}, "has no usable lora_alpha"),
        ({}, {"lora_adapter_metadata": '{"transformer.lora_alpha": 1, "alpha_pattern": [2]}'}, "no usable lora_alpha"),
        ({}, {"lora_adapter_metadata": '{"lora_alpha": 1, "alpha_pattern": {"(": 2}}'}, "no usable lora_alpha"),
        ({}, {"lora_adapter_metadata": '{"lora_alpha": 1, "init_lora_weights": "olora"}'}, "changes the base weights"),
        (
            {},
            {"lora_adapter_metadata": '{"lora_alpha": 1, "use_qalora": true}'},
            "use_qalora makes it more than a LoRA",
        ),
    ],
)
def test_files_that_would_be_misread_are_refused_in_one_line(change, metadata, message, tmp_path):
    tensors = {A: torch.ones(2, 4), B: torch.ones(5, 2)} | change
    path = saved(tensors, tmp_path / "in.safetensors", metadata)
    with pytest.raises(ConfigError, match=rf"--lora_weight .*in.safetensors: .*{message}") as error:
        read_lora(path)
    assert len(str(error.value)) < 600 and str(error.value).isprintable()


def test_an_alpha_among_the_tensors_goes_before_that_of_the_configuration(tmp_path):
    config = {"lora_adapter_metadata": '{"transformer.lora_alpha": 6}'}
    tensors = {A: torch.ones(2, 4), B: torch.ones(5, 2)}
    for extra, alpha in (({}, 6.0), ({A.replace("lora_A.weight", "alpha"): torch.tensor(3.0)}, 3.0)):
        path = saved(tensors | extra, tmp_path / f"{alpha:g}.safetensors", config)
        assert read_lora(path).modules["lora_unet_blocks_0_ffn_0"].alpha == alpha


def test_a_broken_configuration_beside_pefts_weights_is_refused(tmp_path):
    saved({A: torch.ones(2, 4), B: torch.ones(5, 2)}, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_bytes(b"\xff{")
    with pytest.raises(ConfigError, match=r"adapter_config.json beside it is not JSON"):
        read_lora(tmp_path / "adapter")


def test_a_module_without_a_name_in_wan_can_only_be_written_in_musubis_form(tmp_path):
    source = saved({"diffusion_model.vace.0.diff": torch.ones(2, 4)}, tmp_path / "in.safetensors")
    with pytest.raises(ConfigError, match=r"lora_unet_vace_0: is not a module of Wan2.1"):
        convert(source, tmp_path / "out.safetensors", "comfyui")
    convert(source, tmp_path / "out.safetensors", "musubi")
    assert "lora_unet_vace_0.diff" in load_file(tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("metadata", "layout"),
    [
        ({}, None),
        ({"ss_one_frame": "control_index=0;9,target_index=4"}, OneFrameLayout((0, 9), 4)),
        ({"ss_one_frame": "control_index=9;0,target_index=4", "ss_one_frame_legacy_indices": "False"}, ((9, 0), 4)),
        ({"ss_one_frame": "control_index=9;0,target_index=4", "ss_one_frame_legacy_indices": "True"}, ((2, 0), 1)),
        ({"ss_one_frame": "control_index=3,target_index=1", "ss_one_frame_legacy_indices": "True"}, ((1,), 0)),
    ],
)
def test_the_time_indices_are_those_the_lora_was_trained_at(metadata, layout):
    assert layout_from_metadata(metadata) == (OneFrameLayout(*layout) if isinstance(layout, tuple) else layout)


@pytest.mark.parametrize("text", ["832", "832x", "8x480", "832x480x1", "a\nb", "-32x48", "999999x48"])
def test_a_size_that_makes_no_sense_is_refused_in_one_line(text):
    assert size_from_metadata({}) is None and size_from_metadata({"ss_one_frame_size": "832x480"}) == (832, 480)
    with pytest.raises(ConfigError, match=r"^ss_one_frame_size = '[^\n]*': must be like 832x480; give --video_size"):
        size_from_metadata({"ss_one_frame_size": text})


def test_time_indices_that_make_no_sense_are_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"^ss_one_frame = 'a b': unknown key 'a b'"):
        layout_from_metadata({"ss_one_frame": "a\nb"})
