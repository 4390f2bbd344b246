"""wan_lora.py ema: averages of LoRA files against sums by hand, and what it refuses."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import wan_lora
from tests.lora.test_tools import FFN, Q, lora
from utils.errors import ConfigError
from wan.lora.ema import EMAConfig
from wan.lora.files import read_lora


@pytest.fixture
def files(tmp_path):
    """Four files of one training, named so that neither names nor times are in the order of their steps."""
    found = []
    for number, name in enumerate(("d", "b", "a", "c")):
        path = tmp_path / f"{name}.safetensors"
        metadata = {"ss_steps": str(9 + number), "ss_one_frame": "control_index=0,target_index=1"}
        found.append(str(lora(path, seed=number, metadata=metadata)))
        os.utime(path, (1000 - number,) * 2)
    return found


def ema(tmp_path, *arguments):
    out = tmp_path / "out.safetensors"
    out.unlink(missing_ok=True)
    wan_lora.main(["ema", *arguments, "--output_file", str(out)])
    return out


def summed(files, weights):
    """The files, each times its weight, in float64; alpha as in the first."""
    tensors = [load_file(path) for path in files]
    return {
        key: tensors[0][key].double()
        if key.endswith("alpha")
        else sum(weight * one[key].double() for one, weight in zip(tensors, weights, strict=True))
        for key in tensors[0]
    }


def check(out, files, weights):
    found, expected = load_file(out), summed(files, weights)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert_close(found[key].double(), tensor, rtol=1e-5, atol=1e-6)


def test_a_fixed_beta_is_an_exponential_average_in_the_order_of_the_steps(tmp_path, files):
    out = ema(tmp_path, *reversed(files), "--beta", "0.9")
    check(out, files, [0.729, 0.081, 0.09, 0.1])


def test_beta_changes_evenly_to_beta2_and_is_095_by_default(tmp_path, files):
    out = ema(tmp_path, *files, "--beta", "0.8", "--beta2", "0.4")
    check(out, files, [0.8 * 0.6 * 0.4, 0.2 * 0.6 * 0.4, 0.4 * 0.4, 0.6])
    check(ema(tmp_path, *files[:2]), files[:2], [0.95, 0.05])


@pytest.mark.parametrize("gamma", [0.5, 1.0, 5.5])
def test_sigma_rel_gives_the_power_function_of_its_width(tmp_path, files, gamma):
    """The files of a power function weigh t^(gamma + 1) - (t - 1)^(gamma + 1): the integral of t^gamma over each."""
    sigma_rel = (gamma + 1) ** 0.5 / (gamma + 2) / (gamma + 3) ** 0.5
    out = ema(tmp_path, *files, "--sigma_rel", str(sigma_rel))
    check(out, files, np.diff(np.linspace(0, 1, 5) ** (gamma + 1)))


def test_a_number_of_steps_that_no_run_has_counts_as_none(tmp_path, files, caplog):
    lora(files[0], metadata={"ss_steps": "9" * 5000})
    with caplog.at_level("INFO"):
        ema(tmp_path, *files)
    assert "in the order in which they were changed" in caplog.text


def test_files_without_steps_are_taken_by_time_or_as_given(tmp_path, files):
    lora(files[1], seed=1)
    os.utime(files[1], (999, 999))
    check(ema(tmp_path, *files, "--beta", "0.5"), files[::-1], [0.125, 0.125, 0.25, 0.5])
    given = [*files[1:], files[0]]
    check(ema(tmp_path, *given, "--beta", "0.5", "--no_sort"), given, [0.125, 0.125, 0.25, 0.5])


def test_differences_are_averaged_too_and_half_precision_becomes_float32(tmp_path):
    a = lora(tmp_path / "a.safetensors", **{f"{FFN}.diff_b": torch.randn(20)})
    b = tmp_path / "b.safetensors"
    save_file({key: (tensor * 2).half() if "alpha" not in key else tensor for key, tensor in load_file(a).items()}, b)
    out = ema(tmp_path, str(a), str(b), "--beta", "0.5", "--no_sort")
    check(out, [a, b], [0.5, 0.5])
    assert all(tensor.dtype == torch.float32 for tensor in load_file(out).values())


def test_metadata_are_those_of_the_last_file_with_its_sources_and_new_hashes(tmp_path, files):
    out = ema(tmp_path, *files, "--beta", "0.5")
    metadata = read_lora(out).metadata
    assert metadata["ss_steps"] == "12" and metadata["ss_one_frame"] == "control_index=0,target_index=1"
    names = ["d.safetensors", "b.safetensors", "a.safetensors", "c.safetensors"]
    assert json.loads(metadata["ss_average_of"]) == [*map(list, zip(names, [0.125, 0.125, 0.25, 0.5], strict=True))]
    other = ema(tmp_path, *files, "--beta", "0.6")
    with safe_open(other, "pt") as file:
        assert file.metadata()["sshs_model_hash"] != metadata["sshs_model_hash"]


def test_files_of_other_indices_are_named(tmp_path, files, caplog):
    lora(files[0], metadata={"ss_steps": "1", "ss_one_frame": "control_index=0,target_index=9"})
    ema(tmp_path, *files)
    assert (
        "trained at different indices (control_index=0,target_index=1 and control_index=0,target_index=9)"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 2}, "is of another size, alpha or kind than in the files before"),
        ({"alpha": 3.0}, "is of another size, alpha or kind"),
        ({"names": (Q,)}, "lora_unet_blocks_1_ffn_0 is of another size"),
    ],
)
def test_files_that_do_not_fit_each_other_are_refused(tmp_path, files, changes, words):
    lora(files[2], **changes)
    with pytest.raises(ConfigError, match=words):
        ema(tmp_path, *files)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--beta", "1"], "--beta 1"),
        (["--beta2", "nan"], "--beta2 nan"),
        (["--sigma_rel", "0.3"], "--sigma_rel 0.3: must be above 0 and at most 0.288; try 0.15"),
        (["--sigma_rel", "0.1", "--beta", "0.9"], "--sigma_rel takes the place of --beta"),
    ],
)
def test_values_that_make_no_average_are_refused(tmp_path, files, arguments, words):
    with pytest.raises(ConfigError, match=words):
        ema(tmp_path, *files, *arguments)


def test_one_file_and_an_existing_result_are_refused(tmp_path, files):
    with pytest.raises(ConfigError, match="two or more"):
        ema(tmp_path, files[0])
    with pytest.raises(ConfigError, match="exists already"):
        wan_lora.main(["ema", *files, "--output_file", files[0]])


def test_the_first_file_counts_in_full_until_others_come():
    assert EMAConfig(sigma_rel=0.15).betas(3)[0] == EMAConfig(beta=0.5).betas(3)[0] == 0.0
