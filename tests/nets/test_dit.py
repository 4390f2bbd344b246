"""The DiT against diffusers, exact answers and the reference, in float32; and what it promises in bfloat16."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from tests.dit_cases import all_rows
from tests.helpers import golden, manifest_shapes, rel_l2
from wan.nets.attention import sdpa
from wan.nets.conditioning import Conditioning
from wan.nets.context import StepCache, pad_text
from wan.nets.dit import WanDiT
from wan.nets.spec import DiTSpec

SPECS = {
    "t2v": DiTSpec("t2v", 256, 320, num_layers=2, in_dim=16, text_dim=32),
    "i2v": DiTSpec("i2v", 256, 320, num_layers=2, in_dim=36, text_dim=32, image_dim=48),
    "flf2v": DiTSpec("flf2v", 256, 320, num_layers=2, in_dim=36, text_dim=32, image_dim=48),
}
CLIP_IMAGES = {"i2v": 1, "flf2v": 2}

# (ours, diffusers'), applied in this order
DIFFUSERS_NAMES = [
    ("time_embedding.0.", "condition_embedder.time_embedder.linear_1."),
    ("time_embedding.2.", "condition_embedder.time_embedder.linear_2."),
    ("time_projection.1.", "condition_embedder.time_proj."),
    ("text_embedding.0.", "condition_embedder.text_embedder.linear_1."),
    ("text_embedding.2.", "condition_embedder.text_embedder.linear_2."),
    ("img_emb.proj.0.", "condition_embedder.image_embedder.norm1."),
    ("img_emb.proj.1.", "condition_embedder.image_embedder.ff.net.0.proj."),
    ("img_emb.proj.3.", "condition_embedder.image_embedder.ff.net.2."),
    ("img_emb.proj.4.", "condition_embedder.image_embedder.norm2."),
    ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    ("head.head.", "proj_out."),
    ("modulation", "scale_shift_table"),
    ("head.", ""),
    ("self_attn.", "attn1."),
    ("cross_attn.", "attn2."),
    (".norm_k_img.", ".norm_added_k."),
    (".k_img.", ".add_k_proj."),
    (".v_img.", ".add_v_proj."),
    (".q.", ".to_q."),
    (".k.", ".to_k."),
    (".v.", ".to_v."),
    (".o.", ".to_out.0."),
    ("norm3.", "norm2."),
    ("ffn.0.", "ffn.net.0.proj."),
    ("ffn.2.", "ffn.net.2."),
]


@torch.no_grad()
def random_dit(kind, seed=0):
    """Every parameter random, at a scale that lets each of them matter."""
    torch.manual_seed(seed)
    model = WanDiT(SPECS[kind])
    for name, parameter in model.named_parameters():
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        scale = 0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        parameter.copy_(mean + scale * torch.randn_like(parameter))
        if name.endswith(("modulation", "emb_pos")):
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model.eval()


def random_inputs(kind, indices, height=4, width=6):
    """Arguments of WanDiT.forward for a batch with these frame indices."""
    torch.manual_seed(1)
    batch, frames = len(indices), len(indices[0])
    images = CLIP_IMAGES.get(kind, 0)
    return {
        "latents": torch.randn(batch, 16, frames, height, width),
        "conditioning": Conditioning(torch.randn(batch, 20, frames, height, width), torch.randn(batch, images, 257, 48))
        if images
        else Conditioning(),
        "timesteps": torch.tensor([731.25, 42.0, 1000.0])[:batch],
        "text": pad_text([torch.randn(length, 32) for length in (9, 3, 20)[:batch]]),
        "frame_indices": torch.tensor(indices),
    }


def item(inputs, i):
    def one(tensor):
        return tensor[i : i + 1]

    return {name: value.map(one) if name == "conditioning" else one(value) for name, value in inputs.items()}


def diffusers_output(model, inputs):
    """The same weights in diffusers' model; of its rotary table for a longer video the wanted frames are picked."""
    spec = model.spec
    other = WanTransformer3DModel(
        num_attention_heads=spec.num_heads,
        in_channels=spec.in_dim,
        text_dim=spec.text_dim,
        ffn_dim=spec.ffn_dim,
        num_layers=spec.num_layers,
        image_dim=spec.image_dim,
        added_kv_proj_dim=spec.dim if spec.image_dim else None,
        pos_embed_seq_len=514 if spec.model_type == "flf2v" else None,
    )
    state = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in DIFFUSERS_NAMES:
            name = name.replace(ours, theirs)
        state[name] = tensor
    other.load_state_dict(state, strict=True)

    (indices,) = inputs["frame_indices"].tolist()
    frames = max(indices) + 1
    x, (channels, image, _) = inputs["latents"], inputs["conditioning"]
    x = x if channels is None else torch.cat([x, channels], dim=1)
    table = other.rope(torch.zeros(1, 1, frames, *x.shape[3:]))
    picked = tuple(part.unflatten(1, (frames, -1))[:, indices].flatten(1, 2) for part in table)
    other.rope.forward = lambda hidden_states: picked
    image = None if image is None else image.flatten(0, 1)
    with torch.no_grad():
        return other.eval()(x, inputs["timesteps"], all_rows(inputs["text"]), image).sample


@pytest.mark.parametrize("indices", [[0, 1], [0, 8], [3, 200]])
@pytest.mark.parametrize("kind", SPECS)
def test_the_output_is_that_of_diffusers(kind, indices):
    model, inputs = random_dit(kind), random_inputs(kind, [indices])
    with torch.no_grad():
        assert rel_l2(model(**inputs), diffusers_output(model, inputs)) < 1e-5


@torch.no_grad()
def test_items_of_a_batch_with_different_indices_equal_single_calls():
    model, inputs = random_dit("flf2v"), random_inputs("flf2v", [[0, 1, 2], [0, 5, 10], [7, 3000, 4]])
    batch = model(**inputs)
    for i in range(3):
        assert rel_l2(batch[i : i + 1], model(**item(inputs, i))) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", ["t2v", "i2v", "flf2v"])
def test_calls_that_share_a_cache_give_what_they_give_without(kind):
    model, inputs, cache = random_dit(kind), random_inputs(kind, [[0, 3], [0, 3]]), StepCache()
    for factor in (1.0, 0.5):
        changed = inputs | {"latents": factor * inputs["latents"], "timesteps": factor * inputs["timesteps"]}
        assert torch.equal(model(**changed, cache=cache), model(**changed))
    kept = [context.kept for context in cache.prepared.contexts]
    rows = {"t2v": 64, "i2v": 64 + 257, "flf2v": 64 + 514}[kind]
    assert all(entry.keys.shape[:2] == (2, rows) for entry in kept) and kept[0].keys is not kept[1].keys
    cache.prepared.cos.zero_()
    assert not torch.equal(model(**inputs, cache=cache), model(**inputs))


@torch.no_grad()
def test_swapping_frames_together_with_their_indices_swaps_the_output():
    model, inputs = random_dit("i2v"), random_inputs("i2v", [[0, 5, 9]])
    order = [2, 0, 1]
    channels, image, _ = inputs["conditioning"]
    swapped = inputs | {"latents": inputs["latents"][:, :, order]}
    swapped["conditioning"] = Conditioning(channels[:, :, order], image)
    swapped["frame_indices"] = inputs["frame_indices"][:, order]
    expected = model(**inputs)[:, :, order]
    assert rel_l2(model(**swapped), expected) < 1e-5
    assert rel_l2(model(**swapped | {"frame_indices": inputs["frame_indices"]}), expected) > 1e-3


@torch.no_grad()
def test_only_distances_between_frame_indices_matter():
    model, inputs = random_dit("i2v"), random_inputs("i2v", [[0, 8]])
    moved = model(**inputs | {"frame_indices": torch.tensor([[4000, 4008]])})
    assert rel_l2(moved, model(**inputs)) < 1e-4


@torch.no_grad()
def test_every_image_token_of_flf2v_goes_through_the_image_keys_and_values():
    model, inputs = random_dit("flf2v"), random_inputs("flf2v", [[0, 1]])
    seen = {}
    attention = model.blocks[0].cross_attn
    for name in ("k", "k_img"):
        getattr(attention, name).register_forward_hook(
            lambda _m, args, _o, name=name: seen.update({name: args[0].shape[1]})
        )
    model(**inputs)
    assert seen == {"k": 64, "k_img": 514}


@pytest.mark.parametrize(("kind", "training"), [("t2v", False), ("i2v", True), ("i2v", False), ("flf2v", False)])
def test_gradients_reach_every_weight_and_predict_changes_of_the_output(kind, training):
    model, inputs = random_dit(kind).train(training), random_inputs(kind, [[0, 8]])
    latents = inputs["latents"].requires_grad_()
    weight = torch.randn_like(latents)
    (model(**inputs) * weight).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    direction = latents.grad.clone()
    with torch.no_grad():
        step = 1e-2 * direction / direction.norm()
        change = (
            (model(**inputs | {"latents": latents + step}) - model(**inputs | {"latents": latents - step})) * weight
        ).sum()
    assert float(change) == pytest.approx(2 * float((step * direction).sum()), rel=2e-2)


class WithoutWeight(nn.Module):
    """Stands for an adapter around a linear layer."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@torch.no_grad()
def test_linear_layers_of_the_blocks_can_be_replaced():
    model, inputs = random_dit("i2v"), random_inputs("i2v", [[0, 1]])
    expected = model(**inputs)
    for block in model.blocks:
        for parent in (block.self_attn, block.cross_attn, block.ffn):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, WithoutWeight(child))
    assert torch.equal(model(**inputs), expected)


@torch.no_grad()
def test_bfloat16_weights_run_on_a_cpu_with_float32_time_embedding_residual_and_output():
    half = random_dit("flf2v").to(torch.bfloat16)
    full = random_dit("flf2v")
    full.load_state_dict({name: tensor.float() for name, tensor in half.state_dict().items()})
    inputs = random_inputs("flf2v", [[0, 5]])
    seen = {}
    for name, model in (("half", half), ("full", full)):
        model.time_projection.register_forward_hook(lambda _m, _a, out, name=name: seen.update({name: out}))
    half.blocks[0].register_forward_hook(lambda _m, _a, out: seen.update(residual=out))
    out, expected = half(**inputs), full(**inputs)
    assert half.dtype == torch.bfloat16
    assert out.dtype == seen["residual"].dtype == torch.float32
    assert torch.equal(seen["half"], seen["full"])
    assert 1e-5 < rel_l2(out, expected) < 0.02


def test_text_is_padded_with_zeros_and_too_long_text_is_an_error():
    first, second = torch.randn(3, 4), torch.randn(5, 4)
    padded = pad_text([first, second])
    assert padded.shape == (2, 64, 4) and not padded[0, 3:].any() and not padded[1, 5:].any()
    assert torch.equal(padded[0, :3], first) and torch.equal(padded[1, :5], second)
    lengths = [pad_text([torch.ones(length, 4)]).shape[1] for length in (63, 64, 447, 448, 512)]
    assert lengths == [64, 128, 448, 512, 512]  # a row of zeros is left, but where the text takes all
    with pytest.raises(ValueError, match="of 513 tokens; at most 512 fit"):
        pad_text([torch.ones(513, 4)])


@pytest.mark.parametrize("kind", ["t2v", "i2v", "flf2v"])
def test_rows_of_text_that_are_left_out_count_like_the_last_one(kind):
    model, inputs = random_dit(kind), random_inputs(kind, [[0, 3], [0, 1]])
    text = inputs.pop("text")
    whole = all_rows(text)
    assert text.shape[1] == 64
    with torch.no_grad():
        assert_close(model(**inputs, text=text), model(**inputs, text=whole), atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match="513 rows of text"):
            model(**inputs, text=torch.cat([whole, text[:, :1]], dim=1))


CHANNELS, FEATURES = torch.zeros(1, 20, 2, 4, 6), torch.zeros(1, 1, 257, 48)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("i2v", {"conditioning": Conditioning(CHANNELS, None)}, "i2v takes both"),
        ("i2v", {"conditioning": Conditioning(None, FEATURES)}, "i2v takes both"),
        ("t2v", {"conditioning": Conditioning(None, FEATURES)}, "t2v takes neither"),
        ("flf2v", {"conditioning": Conditioning(CHANNELS, FEATURES)}, "257 image tokens; flf2v needs 514"),
        ("i2v", {"frame_indices": torch.tensor([[0, 1, 2]])}, r"frame_indices \(1, 3\)"),
        ("t2v", {"latents": torch.zeros(1, 16, 2, 5, 6)}, "5 x 6; both sides must be even"),
    ],
)
def test_missing_or_ill_shaped_inputs_are_errors(kind, change, message):
    with pytest.raises(ValueError, match=message):
        random_dit(kind)(**random_inputs(kind, [[0, 1]]) | change)


def test_sdpa_is_softmax_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 5, 3, 8), torch.randn(2, 7, 3, 8), torch.randn(2, 7, 3, 8)
    weights = (torch.einsum("blnd,bmnd->bnlm", q, k) / 8**0.5).softmax(-1)
    assert_close(sdpa(q, k, v), torch.einsum("bnlm,bmnd->blnd", weights, v))


@pytest.mark.parametrize("name", ["t2v-1.3B", "t2v-14B", "i2v-14B", "flf2v-14B"])
def test_names_and_shapes_are_those_of_the_published_checkpoint(name):
    published = manifest_shapes(f"dit_{name}")
    with torch.device("meta"):
        model = WanDiT(DiTSpec.from_shapes(published))
    assert {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()} == published


def load_in_float32(path):
    state = {key: tensor.float() for key, tensor in load_file(path).items()}
    with torch.device("meta"):
        model = WanDiT(DiTSpec.from_shapes({key: tuple(tensor.shape) for key, tensor in state.items()}))
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def golden_inputs(reference, items, indices):
    """Arguments for these items of a file of reference outputs."""
    features = reference["clip_fea"].unflatten(0, (2, -1))  # of each item those of one image, or of two
    return {
        "latents": torch.stack([reference[f"x{i}"] for i in items]),
        "conditioning": Conditioning(torch.stack([reference[f"y{i}"] for i in items]), features[items]),
        "timesteps": reference["t"][items],
        "text": pad_text([reference[f"context{i}"] for i in items]),
        "frame_indices": torch.tensor(indices),
    }


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "file", "cases", "batch"),
    [
        ("i2v", "dit_i2v", {"natural": [0, 1], "0_1": [0, 1], "0_8": [0, 8], "3_200": [3, 200]}, ["0_1", "0_8"]),
        (
            "flf2v",
            "dit_flf2v_official_ctx",
            {"natural": [0, 1, 2], "0_1_2": [0, 1, 2], "0_5_10": [0, 5, 10]},
            ["0_1_2", "0_5_10"],
        ),
    ],
)
def test_outputs_match_the_reference(tiny, kind, file, cases, batch):
    model, reference = load_in_float32(tiny[kind]), golden(file)
    for name, indices in cases.items():
        out = model(**golden_inputs(reference, [0], [indices]))
        assert rel_l2(out[0], reference[f"out0_f_{name}"]) < 1e-5
    out = model(**golden_inputs(reference, [0, 1], [cases[name] for name in batch]))
    for i, name in enumerate(batch):
        assert rel_l2(out[i], reference[f"batch_out{i}_f_{name}"]) < 1e-5


@torch.no_grad()
def test_intermediate_values_match_the_reference(tiny):
    model, reference = load_in_float32(tiny["i2v"]), golden("dit_i2v")
    stages = {
        name: getattr(model, name) for name in ("patch_embedding", "time_embedding", "time_projection", "img_emb")
    }
    stages |= {f"block{i}": block for i, block in enumerate(model.blocks)}
    seen = {}
    for name, module in stages.items():
        module.register_forward_hook(lambda _m, _a, out, name=name: seen.update({name: out}))
    model(**golden_inputs(reference, [0], [[0, 8]]))
    assert len(seen) == 7
    for name, value in seen.items():
        assert rel_l2(value, reference[f"mid0_f_0_8_{name}"]) < 1e-5, name
