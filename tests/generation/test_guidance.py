"""Guidance schedules against the spec's examples, and skip-layer guidance against its formulas."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from tests.training.test_loop import SPEC, inputs
from utils.errors import ConfigError
from wan.generation.guidance import GuidanceConfig
from wan.nets.dit import WanDiT


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("early", "SSSSAAAAAA"),
        ("late", "AAAAAASSSS"),
        ("middle", "AAASSSSAAA"),
        ("early_late", "SSAAAAAASS"),
        ("alternate", "SASASAASAS"),
        ("none", "AAAAAAAAAA"),
    ],
)
def test_ten_steps_at_a_ratio_of_0_6_are_guided_as_the_spec_lists(mode, expected):
    config = GuidanceConfig(cfg_skip_mode=mode, cfg_apply_ratio=0.6)
    found = "".join("A" if guided else "S" for guided in config.guided_steps(10))
    assert found == expected


def test_skip_layer_guidance_acts_on_a_share_of_the_steps():
    config = GuidanceConfig(slg_mode="uncond", slg_layers="1", slg_start=0.2, slg_end=0.5)
    assert [config.skips_layers(step, 10) for step in range(10)] == [False] * 2 + [True] * 3 + [False] * 5
    assert not GuidanceConfig().skips_layers(0, 10)


def test_skipping_every_block_leaves_embedding_and_head():
    torch.manual_seed(0)
    dit, tensors = WanDiT(SPEC).eval(), inputs()
    arguments = (tensors["latents"], tensors["conditioning"], torch.tensor([500.0]), tensors["text"])
    with torch.no_grad():
        skipped = dit(*arguments, tensors["frame_indices"], skip_blocks=frozenset({0, 1}))
        dit.blocks = torch.nn.ModuleList()
        assert_close(dit(*arguments, tensors["frame_indices"]), skipped, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cfg_skip_mode": "early"}, "--cfg_apply_ratio"),
        ({"cfg_apply_ratio": 1.5}, "--cfg_apply_ratio 1.5"),
        ({"slg_mode": "uncond"}, "--slg_layers"),
        ({"slg_layers": "a"}, None),
        ({"slg_mode": "uncond", "slg_layers": "a"}, "--slg_layers a"),
        ({"slg_start": 0.5, "slg_end": 0.2}, "--slg_start 0.5"),
    ],
)
def test_impossible_settings_are_refused(settings, words):
    if words is None:
        assert replace(GuidanceConfig(), **settings).slg_mode is None
        return
    with pytest.raises(ConfigError, match=words):
        GuidanceConfig(**settings)


def test_blocks_that_the_model_lacks_are_refused():
    config = GuidanceConfig(slg_mode="uncond", slg_layers="1,40")
    config.check(41)
    with pytest.raises(ConfigError, match="not 40"):
        config.check(40)
