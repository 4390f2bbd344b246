"""Previews: the linear map is the best one, and shows what the run will make."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

import wan.generation.run
from tests.dit_cases import CPU, denoised
from tests.frames.test_scratch import Alone, encoded, resolved
from tests.project import I2V, generate, pipeline, train
from utils.errors import ConfigError
from wan.generation import sampling
from wan.generation.pipeline import Pipeline, initial_noise
from wan.generation.preview import LatentPreview, PreviewConfig, synthetic_images
from wan.nets.conditioning import Conditioning
from wan.nets.context import pad_text

pytestmark = pytest.mark.usefixtures("workspace")
FLAGS = [
    *("--control_image_path", "data/start/cat.png", "--prompt", "a", "--seed", "3", "--infer_steps", "4"),
    *("--one_frame_inference", "control_index=0,target_index=1", "--video_size", "32", "48"),
]


class LinearVAE:
    """A stand-in whose latents are 16 mixtures of the mean colour of 8 x 8 pixels."""

    def __init__(self, rank: int = 3) -> None:
        generator = torch.Generator().manual_seed(1)
        self.mixture, self.shift = torch.randn(16, 3, generator=generator), torch.randn(16, generator=generator)
        self.mixture[:, rank:] = 0

    def encode(self, image: Tensor) -> Tensor:
        """[3, 8 H, 8 W] -> [16, 1, H, W]"""
        return (torch.einsum("cr,rhw->chw", self.mixture, means(image)) + self.shift[:, None, None])[:, None]


def means(image: Tensor) -> Tensor:
    return F.avg_pool2d(image, 8)


def shown(preview: LatentPreview, latents: Tensor) -> Tensor:
    """[3, H, W] in [-1, 1] before the picture is enlarged."""
    return torch.einsum("rc,chw->rhw", preview.weight, latents[:, 0]) + preview.bias[:, None, None]


def test_a_linear_vae_is_undone_exactly():
    vae, images = LinearVAE(), synthetic_images()
    preview = LatentPreview.fit(images, [vae.encode(image) for image in images])
    other = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(2)) * 2 - 1
    assert_close(shown(preview, vae.encode(other)), means(other), rtol=0, atol=1e-5)


def test_no_other_map_is_closer_where_colours_got_lost():
    vae, images = LinearVAE(rank=2), synthetic_images()  # blue is lost
    latents = [vae.encode(image) for image in images]
    preview = LatentPreview.fit(images, latents)
    colours = torch.cat([means(image).flatten(1) for image in images], dim=1)
    left = colours - torch.cat([shown(preview, latent).flatten(1) for latent in latents], dim=1)
    values = torch.cat([latent.flatten(1) for latent in latents], dim=1)
    assert left[:2].abs().max() < 1e-4 and left[2].abs().max() > 0.1
    assert (left @ values.T).abs().max() / values.shape[1] < 1e-4 and left.mean(dim=1).abs().max() < 1e-4


def test_a_picture_has_the_size_of_the_image_and_its_colours():
    vae, images = LinearVAE(), synthetic_images()
    preview = LatentPreview.fit(images, [vae.encode(image) for image in images])
    colour = torch.tensor([1.0, -1.0, 0.0])
    latents = vae.encode(colour[:, None, None].expand(3, 32, 48))
    picture = preview.image(torch.cat([torch.zeros_like(latents), latents], dim=1))  # of several frames the last counts
    assert picture.size == (48, 32)
    assert np.abs(np.asarray(picture, dtype=int) - [255, 0, 127.5]).max() <= 1


def test_synthetic_images_are_always_the_same_and_hold_all_colours():
    images = torch.stack(synthetic_images())
    assert torch.equal(images, torch.stack(synthetic_images())) and images.abs().max() <= 1
    assert images.amax(dim=(0, 2, 3)).min() > 0.9 and images.amin(dim=(0, 2, 3)).max() < -0.9


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("solver", sampling.SOLVERS)
def test_each_step_tells_the_image_that_it_predicts(solver, count):
    """Of a network that always points at the same image, every prediction is that image."""
    item, seen = encoded(count, 2, solver=solver), []
    goal = torch.randn(16, 1, 4, 6, generator=torch.Generator().manual_seed(5))
    levels = dict(
        zip(
            sampling.schedule(solver, 5, 5.0).timesteps.tolist(),
            sampling.schedule(solver, 5, 5.0).sigmas.tolist(),
            strict=False,
        )
    )

    def towards(latents, condition, timesteps, *_others, **_more):
        return (latents - goal) / levels[float(timesteps[0])]

    result = denoised(towards, item, watch=lambda step, latents: seen.append((step, latents)))
    assert [step for step, _ in seen] == list(range(5))
    for _, latents in seen:
        assert_close(latents, goal, rtol=0, atol=1e-4)
    assert_close(result, goal, rtol=0, atol=1e-4)


def test_the_first_prediction_is_the_formula():
    item, seen = encoded(0, 0, solver="vanilla"), []
    denoised(Alone(), item, watch=lambda _step, latents: seen.append(latents))
    noise, network = initial_noise((16, 2, 4, 6), 1, CPU, False), Alone()
    inputs = noise[None], Conditioning(item.conditioning.channels[None]), torch.tensor([1000.0])
    texts = [pad_text([text]) for text in (item.text, item.negative)]
    conditional, unconditional = (network(*inputs, text, torch.tensor([[0, 7]]))[0] for text in texts)
    velocity = unconditional + 3 * (conditional - unconditional)
    assert_close(seen[0], (noise - velocity)[:, 1:], rtol=1e-4, atol=1e-4)


def test_watching_changes_nothing():
    assert torch.equal(denoised(Alone(), encoded(2, 2), watch=lambda *_: None), denoised(Alone(), encoded(2, 2)))


@pytest.fixture
def saved(monkeypatch):
    """Name, size and pixels of all previews that are written."""
    seen, original = [], LatentPreview.save

    def save(self, latents, path):
        original(self, latents, path)
        with Image.open(path) as picture:
            seen.append((path.name, picture.size, picture.tobytes()))

    monkeypatch.setattr(LatentPreview, "save", save)
    return seen


def test_the_script_writes_it_every_n_steps_and_takes_it_away_when_the_picture_is_there(saved):
    (plain,) = generate("i2v", "plain", *FLAGS, "--infer_steps", "5")
    assert saved == []
    (path,) = generate("i2v", "out", *FLAGS, "--infer_steps", "5", "--preview", "2")
    assert path.read_bytes() == plain.read_bytes()
    stem = path.name.removesuffix("_000.png")
    assert [name for name, _, _ in saved] == [f"{stem}_preview.png"] * 2
    assert {size for _, size, _ in saved} == {Image.open(path).size} and saved[0] != saved[1]


def test_a_training_sample_has_previews_too_and_is_the_same_picture(saved):
    Path("prompts.txt").write_text(I2V, encoding="utf-8")
    flags = ("--sample_prompts", "prompts.txt", "--sample_at_first")
    train("i2v", "pairs.toml", "plain", *flags)
    assert saved == []
    train("i2v", "pairs.toml", "watched", *flags, "--preview", "1")
    plain, watched = (next(Path("output/sample").glob(f"{name}_*")) for name in ("plain", "watched"))
    assert watched.read_bytes() == plain.read_bytes() and len(list(Path("output/sample").glob("watched_*"))) == 1
    assert saved and {name for name, _, _ in saved} == {watched.name.replace("_000.png", "_preview.png")}
    assert {size for _, size, _ in saved} == {Image.open(watched).size}


def test_a_picture_that_fails_leaves_its_preview(monkeypatch):
    original = wan.generation.run.denoise
    monkeypatch.setattr(wan.generation.run, "denoise", lambda *arguments: original(*arguments) * float("nan"))
    with pytest.raises(ConfigError, match="1 of 1 images"):
        generate("i2v", "out", *FLAGS, "--preview", "1")
    (left,) = Path("out").iterdir()
    assert left.name.endswith("_3_preview.png")
    shutil.rmtree("out")


def test_the_fit_sees_the_control_images(monkeypatch):
    seen = []
    monkeypatch.setattr(LatentPreview, "fit", lambda pixels, latents: seen.append((pixels, latents)))
    line: Pipeline = pipeline()
    request = resolved()
    line.fit_preview([request, request])
    ((pixels, latents),) = seen
    assert len(pixels) == len(latents) == len(synthetic_images()) + 1
    assert pixels[-1].shape == (3, request.height, request.width)
    assert latents[-1].shape == (16, 1, request.height // 8, request.width // 8)


def test_fewer_than_one_step_is_an_error():
    with pytest.raises(ConfigError, match="--preview 0: must be at least 1"):
        PreviewConfig(0)
