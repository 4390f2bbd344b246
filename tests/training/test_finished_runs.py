"""A finished LoRA is not replaced by another training of its name, and a finished run says that it is."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import wan_train_network
from tests.project import model_flags, run_flags, train
from utils.errors import ConfigError

pytestmark = pytest.mark.usefixtures("copied_workspace")


def run(*flags: str) -> Path:
    """One step of the run `mine`."""
    wan_train_network.main(
        [
            *(*model_flags("i2v"), *run_flags(), "--dataset_config", "pairs.toml", "--network_dim", "2"),
            *("--max_data_loader_n_workers", "0", "--output_dir", "output", "--output_name", "mine"),
            *("--max_train_steps", "1", "--seed", "1", *flags),
        ]
    )
    return Path("output/mine.safetensors")


@pytest.mark.parametrize("flags", [(), ("--resume", "auto")])
def test_a_finished_lora_is_replaced_only_when_that_is_asked_for(flags):
    first = run().read_bytes()
    with pytest.raises(
        ConfigError, match=r"^--output_name mine: output.mine\.safetensors is a finished LoRA; .*--overwrite"
    ):
        run("--network_alpha", "2", *flags)
    assert Path("output/mine.safetensors").read_bytes() == first
    assert run("--network_alpha", "2", "--overwrite").read_bytes() != first
    assert train("i2v", "pairs.toml", "other").is_file()


def test_explain_says_that_a_run_would_stop(caplog):
    run()
    run("--explain")
    assert "a run would stop: --output_name mine: " in caplog.text


def test_a_finished_run_says_so_and_goes_on_when_it_gets_more_steps(caplog):
    first = load_file(run("--save_state_on_train_end"))
    caplog.set_level(logging.INFO)
    assert_close(load_file(run("--save_state_on_train_end", "--resume", "auto")), first, rtol=0, atol=0)
    assert "the run is finished: all 1 steps are done" in caplog.text
    caplog.clear()
    more = load_file(run("--resume", "auto", "--max_train_steps", "2"))
    assert any(not torch.equal(more[name], first[name]) for name in first)
    assert "the run is finished" not in caplog.text
