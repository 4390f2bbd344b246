"""The nodes make our conditions, time indices and pictures out of ComfyUI's tensors."""

import importlib
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from tests.comfyui.stand_in import VAE, ClipVision, Model, Network, as_image, installed
from utils.errors import ConfigError
from wan.frames.encode import latent_mask
from wan.frames.encoding import Pictures
from wan.frames.layout import OneFrameLayout, parse
from wan.lora.trained_for import layout_from_metadata
from wan.nets.clip import IMAGE_SIZE, preprocess
from wan.nets.conditioning import Conditioning
from wan.nets.rope import grid_positions, rope_angles
from wan.nets.vae import WanVAE

WIDTH, HEIGHT = 48, 32
LAYOUTS = [
    "control_index=0,target_index=1",
    "control_index=0,target_index=7,layout=causal",
    "control_index=3,target_index=1",
    "control_index=0;2,target_index=1",
    "control_index=0;2,target_index=1,layout=causal",
    "control_index=9;0;4,target_index=2",
    "control_index=5;1;2,target_index=30,layout=causal",
]
METADATA = {
    "plain": {"ss_one_frame": "control_index=0,target_index=7", "ss_one_frame_size": "384x576"},
    "legacy": {
        "ss_one_frame": "control_index=9;0,target_index=4",
        "ss_one_frame_size": "832x480",
        "ss_one_frame_legacy_indices": "True",
    },
    "silent": {},
}


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    for name, metadata in METADATA.items():
        save_file({"x": torch.zeros(1)}, folder / f"{name}.safetensors", metadata)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def package(loras) -> ModuleType:
    with installed(loras):
        yield importlib.import_module("comfyui.wan_one_frame.nodes")


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    torch.manual_seed(0)
    return WanVAE(8).requires_grad_(False)


def images(layout: OneFrameLayout) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (3, HEIGHT, WIDTH)
    return [torch.randint(256, shape, generator=generator, dtype=torch.uint8) for _ in layout.control_indices]


def chained(package: ModuleType, pictures: list[Tensor], masks: list[Tensor | None]) -> tuple:
    controls: tuple = ()
    for levels, mask in zip(pictures, masks, strict=True):
        (controls,) = package.WanOneFrameControl().add(as_image(levels), mask, previous=controls)
    return controls


def made(package: ModuleType, vae: WanVAE, text: str, masks: list[Tensor | None] | None = None, **inputs):
    """Outputs of `Wan one-frame` for random images."""
    pictures = images(parse(text))
    controls = chained(package, pictures, masks or [None] * len(pictures))
    conditioning = [["text", {}]]
    return package.WanOneFrame().make(
        **{"model": Model(Network()), "positive": conditioning, "negative": conditioning, "vae": VAE(vae)} | inputs,
        **{"controls": controls, "layout": text, "width": WIDTH, "height": HEIGHT},
    )


def as_the_network_sees_it(conditioning: list) -> Tensor:
    """[20, F, H, W]: ComfyUI turns the mask over and normalises the latents."""
    values = conditioning[0][1]
    latents = VAE(None).space.process_in(values["concat_latent_image"])
    return torch.cat([1 - values["concat_mask"], latents], dim=1)[0]


def ours(vae: WanVAE, text: str, masks: list[Tensor | None] | None = None) -> Conditioning:
    layout = parse(text)
    pictures = Pictures(layout.clip, images(layout), masks or [None] * len(layout.control_indices), (WIDTH, HEIGHT))
    return layout.encoding.condition(vae, pictures, {})


@pytest.mark.parametrize("text", LAYOUTS)
def test_conditions_are_ours(text, package, vae):
    _, positive, negative, latent, _ = made(package, vae, text)
    expected = ours(vae, text).channels
    assert_close(as_the_network_sees_it(positive), expected, rtol=0, atol=2e-6)
    assert_close(as_the_network_sees_it(negative), expected, rtol=0, atol=2e-6)
    assert latent["samples"].shape[2:] == expected.shape[1:] and not latent["samples"].any()


def test_masks_hide_what_is_transparent_as_ours_do(package, vae):
    text = "control_index=0;2,target_index=1"
    hidden = torch.zeros(1, HEIGHT, WIDTH)
    hidden[:, :, : WIDTH // 2], hidden[:, 4:, WIDTH // 2] = 1, 0.25  # edges between latents, and within one
    _, positive, *_ = made(package, vae, text, [hidden, torch.zeros(1, 64, 64)])
    used = F.avg_pool2d(1 - hidden, 8)[0]
    assert 0 < used[0, WIDTH // 16] < 1
    assert_close(as_the_network_sees_it(positive), ours(vae, text, [used, None]).channels, rtol=0, atol=2e-6)


def test_a_latent_of_a_mask_is_the_mean_that_caching_takes(package):
    levels = torch.randint(256, (HEIGHT, WIDTH), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    used = package._used(1 - levels[None] / 255, WIDTH, HEIGHT)
    expected = latent_mask(Image.fromarray(levels.numpy()), (WIDTH, HEIGHT))
    assert_close(F.avg_pool2d(used, 8)[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("text", LAYOUTS)
def test_latent_frames_sit_at_their_time_indices(text, package, vae):
    model, *_ = made(package, vae, text)
    times = torch.tensor([parse(text).clip.time_indices])
    expected = rope_angles(grid_positions(times, 2, 3))[:, :, None]
    assert_close(model.rope(times.numel(), 2, 3), expected, rtol=0, atol=0)


def test_a_model_is_placed_anew_and_the_first_one_stays_where_it_was(package, vae):
    first, *_ = made(package, vae, "control_index=0,target_index=7")
    second, *_ = made(package, vae, "control_index=0,target_index=3", model=first)
    assert not torch.equal(first.rope(2, 1, 1), second.rope(2, 1, 1))
    with pytest.raises(ValueError, match=r"3 latent frames for the time indices \[0, 7\]"):
        first.rope(3, 1, 1)


def test_a_model_that_cannot_be_placed_is_refused_only_where_that_matters(package, vae):
    class Old:
        img_emb = None

    made(package, vae, "control_index=0,target_index=1", model=Model(Old()))
    with pytest.raises(ValueError, match=r"control_index=0,target_index=7: .* update ComfyUI"):
        made(package, vae, "control_index=0,target_index=7", model=Model(Old()))


@pytest.mark.parametrize("count", [1, 2])
def test_clip_sees_the_earliest_control_and_for_flf2v_the_latest_too(count, package, vae):
    text, clip = "control_index=9;0;4,target_index=2", ClipVision()
    model = Model(Network(images=count))
    _, positive, *_ = made(package, vae, text, model=model, clip_vision=clip)
    pictures = images(parse(text))
    expected = [pictures[1], pictures[0]][:count]
    assert len(clip.seen) == count
    for seen, levels in zip(clip.seen, expected, strict=True):
        mean_and_std = preprocess((seen * 2 - 1).movedim(-1, 1))
        assert seen.shape == (1, IMAGE_SIZE, IMAGE_SIZE, 3)
        assert_close(mean_and_std, preprocess(levels[None] / 127.5 - 1), rtol=0, atol=1e-5)
    states = positive[0][1]["clip_vision_output"].penultimate_hidden_states
    assert states.shape == (1, 257 * count, 8)


@pytest.mark.parametrize("text", ["control_index=0;2,target_index=1", "control_index=0;2,target_index=1,layout=causal"])
def test_the_target_is_decoded_as_ours(text, package, vae):
    layout = parse(text)
    latents = torch.randn(1, 16, 3, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(2))
    *_, frames = made(package, vae, text)
    samples = {"samples": VAE(vae).space.process_out(latents)}
    (picture,) = package.WanOneFrameDecode().decode(samples, VAE(vae), frames)
    expected = layout.encoding.decode(vae, layout.encoding.target(layout.clip, latents[0]), None)[-1]
    assert picture.shape == (1, HEIGHT, WIDTH, 3)
    assert_close(picture[0].movedim(-1, 0) * 2 - 1, expected.clamp(-1, 1), rtol=0, atol=1e-5)


def test_a_lora_tells_its_indices_and_size(package):
    for name in ("plain", "legacy"):
        _, text, width, height = package.WanOneFrameLora().load(Model(Network()), f"{name}.safetensors", 0.5)
        assert parse(text) == layout_from_metadata(METADATA[name])
        assert f"{width}x{height}" == METADATA[name]["ss_one_frame_size"]
    assert package.nodes.loaded == [("plain.safetensors", 0.5), ("legacy.safetensors", 0.5)]
    with pytest.raises(ValueError, match=r"silent\.safetensors: does not say"):
        package.WanOneFrameLora().load(Model(Network()), "silent.safetensors", 1.0)


@pytest.mark.parametrize("text", [*LAYOUTS, " control_index = 0 ; 2 , target_index = 1 ", "control_index=1"])
def test_indices_are_read_as_in_the_scripts(text, package):
    frames, layout = package.parse(text), parse(text)
    assert str(frames) == str(layout)
    assert frames.times == layout.clip.time_indices and frames.order == layout.clip.order
    assert frames.target_slot == layout.clip.target_slot


@pytest.mark.parametrize(
    "text",
    [
        *("control_index=0,target_index=0", "control_index=0;0,target_index=1", "control_index=-1,target_index=1"),
        *(
            "control_index=x,target_index=1",
            "controls=0,target_index=1",
            "control_index=0,control_index=2,target_index=1",
        ),
        *("control_index=2,target_index=1,layout=causal", "control_index=0,target_index=1,layout=other", "1"),
    ],
)
def test_what_the_scripts_refuse_is_refused(text, package):
    with pytest.raises(ConfigError):
        parse(text)
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        package.parse(text)


def test_control_images_of_a_size_of_their_own_and_clips_without_any_are_refused(package, vae):
    for text in ("control_index=0,target_index=1,control_resolution=64x64", "target_index=1"):
        with pytest.raises(ValueError, match="control"):
            package.parse(text)
    with pytest.raises(ValueError, match="2 control images for control_index=0,target_index=1"):
        package.WanOneFrame().make(
            *(Model(Network()), [], [], VAE(vae)),
            chained(package, images(parse("control_index=0;2,target_index=1")), [None, None]),
            *("control_index=0,target_index=1", WIDTH, HEIGHT),
        )
    with pytest.raises(ValueError, match="masks"):
        made(package, vae, LAYOUTS[1], [torch.ones(1, HEIGHT, WIDTH)])


def test_larger_images_are_brought_to_the_size(package):
    image = torch.rand(1, 3 * HEIGHT, 2 * WIDTH, 3)
    fitted = package._fitted(image, WIDTH, HEIGHT, "area", "lanczos")
    middle = image[:, HEIGHT // 2 : HEIGHT // 2 + 2 * HEIGHT]
    assert_close(fitted, middle.unfold(1, 2, 2).unfold(2, 2, 2).mean((-1, -2)))
