"""Validation: the same noise every time, exact means, processes that agree, and a model left as it was."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dataset.loader import BatchItems, TrainingSet, ValidationSet, clip_for, load_batch
from tests.dataset.test_loader import LAYOUT, cached, config, write
from utils.errors import ConfigError
from wan.models.device import Processes
from wan.nets.conditioning import Conditioning
from wan.nets.context import pad_text
from wan.nets.dit import WanDiT
from wan.nets.spec import DiTSpec
from wan.training.cadence import Every
from wan.training.loss import flow_matching_loss
from wan.training.validation import ValidationConfig, Validator, validate

CPU = torch.device("cpu")
LEVELS = (0.1, 0.5, 0.9)


@pytest.fixture
def validation_set(tmp_path) -> ValidationSet:
    """Items a, b and c of two sizes."""
    write(tmp_path / "0", "train")
    for stem, height in (("a", 2), ("b", 4), ("c", 2)):
        write(tmp_path / "1", stem, cached(LAYOUT, height=height))
    return TrainingSet(config(tmp_path, "", "validation = true"), seed=1).validation


class Recorder:
    """A loss that is the noise level times 1, 2, 3 for the items a, b, c."""

    def __init__(self):
        self.noise, self.batches = {}, []

    def __call__(self, batch, noise, t):
        assert noise.shape == batch.latents.shape and t.shape == (1,) and not torch.is_grad_enabled()
        (key,) = batch.item_keys
        self.batches.append(key)
        self.noise[key, round(t.item(), 6)] = noise
        return t * ("abc".index(key[2]) + 1)


def test_the_loss_at_each_level_is_the_mean_over_the_items(validation_set):
    losses = validate(Recorder(), validation_set, LEVELS, 1, CPU)
    assert losses == {level: pytest.approx(2 * level) for level in LEVELS}


def test_the_noise_of_an_item_and_level_is_the_same_at_every_call_and_different_for_others(validation_set):
    first, second, alone, other = Recorder(), Recorder(), Recorder(), Recorder()
    validate(first, validation_set, LEVELS, 1, CPU)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    validate(second, validation_set, (0.9, 0.1), 1, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    validate(alone, ValidationSet(validation_set.items[2:]), LEVELS, 1, CPU)
    validate(other, validation_set, LEVELS, 2, CPU)
    assert len(first.noise) == 9 and len(second.noise) == 6 and len(alone.noise) == 3
    for again in (second, alone):
        assert all(torch.equal(first.noise[address], noise) for address, noise in again.noise.items())
    assert not any(torch.equal(first.noise[address], noise) for address, noise in other.noise.items())
    beginnings = {tuple(noise.flatten()[:4].tolist()) for noise in first.noise.values()}
    assert len(beginnings) == 9


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_processes_take_equally_many_turns_and_together_see_each_item_once(validation_set, processes):
    sums, calls = [], []
    for process in range(processes):
        recorder = Recorder()
        validate(
            recorder,
            validation_set,
            LEVELS,
            1,
            CPU,
            Processes(process, processes),
            lambda own: sums.append(own) or own + 1,
        )
        calls.append(len(recorder.batches))
    assert len(set(calls)) == 1
    assert_close(sum(sums), torch.tensor([0.6, 3.0, 5.4, 3.0], dtype=torch.float64))
    reduced = validate(Recorder(), validation_set, LEVELS, 1, CPU, Processes(0, processes), lambda own: sum(sums))
    assert reduced == {level: pytest.approx(2 * level) for level in LEVELS}


def test_a_dit_is_measured_by_the_flow_matching_loss(validation_set):
    torch.manual_seed(0)
    dit = WanDiT(DiTSpec("i2v", dim=256, ffn_dim=64, num_layers=1, in_dim=36, text_dim=3, image_dim=6)).eval()

    def loss(batch, noise, t):
        return flow_matching_loss(
            dit,
            latents=batch.latents,
            text=pad_text(batch.text),
            conditioning=Conditioning(batch.conditioning.channels, clip_for(batch, 1)),
            frame_indices=batch.frame_indices,
            noise=noise,
            t=t,
        )

    recorder = Recorder()
    validate(recorder, validation_set, (0.3,), 7, CPU)
    expected = [
        loss(load_batch(BatchItems((item,))), recorder.noise[item.key, 0.3], torch.tensor([0.3])).item()
        for item in validation_set.items
    ]
    assert len(set(expected)) == 3
    assert validate(loss, validation_set, (0.3,), 7, CPU)[0.3] == pytest.approx(sum(expected) / 3, rel=1e-6)


class Model(nn.Module):
    """Its base has loss 4; the LoRA lowers that."""

    def __init__(self):
        super().__init__()
        self.lora, self.measured = 1.0, []

    @contextmanager
    def without_lora(self):
        lora, self.lora = self.lora, 0.0
        try:
            yield
        finally:
            self.lora = lora

    def measure(self):
        assert not self.training
        self.measured.append(self.lora)
        return {0.25: 4 - self.lora, 0.75: 2 - self.lora}


@pytest.mark.parametrize("training", [True, False])
def test_the_base_model_is_measured_once_and_logged_beside_the_lora(training):
    model = Model().train(training)
    validator = Validator(model, model.without_lora, model.measure)
    base = {"validation/base_loss": 3.0, "validation/base_loss_t0.25": 4.0, "validation/base_loss_t0.75": 2.0}
    assert validator.scalars() == base | {
        "validation/loss": 2.0,
        "validation/loss_t0.25": 3.0,
        "validation/loss_t0.75": 1.0,
    }
    model.lora = 1.5
    assert validator.scalars() == base | {
        "validation/loss": 1.5,
        "validation/loss_t0.25": 2.5,
        "validation/loss_t0.75": 0.5,
    }
    assert model.measured == [0.0, 1.0, 1.5] and model.training is training


def test_the_model_is_in_train_mode_again_after_an_error():
    model = Model().train()

    def fail():
        raise ConfigError("a cache is gone")

    with pytest.raises(ConfigError, match="a cache is gone"):
        Validator(model, model.without_lora, fail).scalars()
    assert model.training and model.lora == 1.0


def test_levels_are_the_centres_of_equal_parts_and_keep_different_names():
    assert ValidationConfig().levels == pytest.approx((0.1, 0.3, 0.5, 0.7, 0.9))
    assert ValidationConfig(validation_levels=1).levels == (0.5,)
    for count in range(1, 101):
        levels = ValidationConfig(validation_levels=count).levels
        names = Validator(Model(), Model().without_lora, lambda levels=levels: dict.fromkeys(levels, 1.0)).scalars()
        assert len(names) == 2 * count + 2


def test_steps_and_epochs_at_which_to_validate():
    steps, epochs = ValidationConfig(validate_every_n_steps=3), ValidationConfig(validate_every_n_epochs=2)
    assert (steps.every, epochs.every, ValidationConfig().every) == (Every(steps=3), Every(epochs=2), Every())
    assert steps.wanted and epochs.wanted and not ValidationConfig().wanted


@pytest.mark.parametrize("split", [0.6, -0.1, 1.5, float("nan"), float("inf")])
def test_a_split_that_is_neither_share_nor_number_is_refused(split):
    with pytest.raises(ConfigError, match=f"^--validation_split {split:g}: must be a share up to 0.5 or a number"):
        ValidationConfig(validation_split=split, validate_every_n_steps=1)


@pytest.mark.parametrize("split", [0.0, 0.1, 0.5, 1.0, 12.0])
def test_shares_and_numbers_of_items_are_accepted(split):
    assert ValidationConfig(validation_split=split, validate_every_n_steps=1).validation_split == split


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_split": 0.1}, "--validation_split needs --validate_every_n_steps"),
        ({"validate_every_n_steps": 0}, "--validate_every_n_steps 0: must be at least 1"),
        ({"validate_every_n_epochs": -1}, "--validate_every_n_epochs -1: must be at least 1"),
        ({"validation_levels": 0}, "--validation_levels 0: use 1 to 100"),
        ({"validation_levels": 101}, "--validation_levels 101: use 1 to 100"),
    ],
)
def test_impossible_settings_are_refused_by_flag_name(options, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        ValidationConfig(**options)


def test_validating_without_items_is_refused_and_items_without_validating_are_warned_about(validation_set, caplog):
    wanted = ValidationConfig(validate_every_n_epochs=2)
    wanted.check(validation_set)
    ValidationConfig().check(ValidationSet(()))
    assert not caplog.records
    with pytest.raises(ConfigError, match=r"^--validate_every_n_epochs 2: there are no items to validate with; add"):
        wanted.check(ValidationSet(()))
    ValidationConfig().check(validation_set)
    assert "3 items with validation = true are never used" in caplog.text
