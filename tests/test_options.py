"""Every flag of musubi-tuner is known to each script: as an option, or refused or ignored with a reason."""

import argparse
import json
from pathlib import Path
from typing import get_type_hints

import hypothesis
import pytest
from hypothesis import strategies as st

import wan_cache_latents
import wan_cache_text_encoder_outputs
import wan_dataset
import wan_generate_video
import wan_train_network
from dataset.check import CheckConfig
from tests.helpers import RECORDINGS
from utils import cli
from utils.errors import ConfigError
from utils.options import declared_options, flag_name
from wan.generation.options import MergedModelConfig
from wan.generation.start import GenerationModels, GenerationOptions
from wan.training.options import TrainingModels, TrainingOptions

SCRIPTS = {
    "wan_cache_latents": wan_cache_latents,
    "wan_cache_text_encoder_outputs": wan_cache_text_encoder_outputs,
    "wan_train_network": wan_train_network,
    "wan_generate_video": wan_generate_video,
}

# script -> its flags: `works` and `ours` are options, of which musubi-tuner has the former; those of `refused` raise an
# error and those of `ignored` a warning, each with its reason.
FLAGS = {
    "wan_cache_latents": {
        "works": "dataset_config vae clip one_frame device batch_size num_workers skip_existing keep_cache vae_dtype "
        "disable_cudnn_backend",
        "ours": "clip_dtype ckpt_dir one_frame_layout alpha explain vae_backend",
        "refused": "debug_mode",
        "ignored": "vae_cache_cpu i2v console_width console_back console_num_images",
    },
    "wan_cache_text_encoder_outputs": {
        "works": "dataset_config t5 device batch_size num_workers skip_existing keep_cache fp8_t5",
        "ours": "t5_dtype t5_tokenizer ckpt_dir explain",
        "refused": "",
        "ignored": "",
    },
    "wan_train_network": {
        "works": "config_file dataset_config task dit vae vae_dtype t5 clip one_frame fp8_base fp8_scaled sdpa compile "
        "compile_backend compile_mode compile_dynamic compile_fullgraph compile_cache_size_limit cuda_allow_tf32 "
        "cuda_cudnn_benchmark max_train_steps max_train_epochs seed mixed_precision gradient_checkpointing "
        "gradient_checkpointing_cpu_offload gradient_accumulation_steps max_data_loader_n_workers "
        "persistent_data_loader_workers save_precision blocks_to_swap use_pinned_memory_for_block_swap optimizer_type "
        "optimizer_args learning_rate max_grad_norm lr_scheduler lr_warmup_steps lr_decay_steps "
        "lr_scheduler_type lr_scheduler_args "
        "lr_scheduler_num_cycles lr_scheduler_power lr_scheduler_timescale lr_scheduler_min_lr_ratio "
        "timestep_sampling discrete_flow_shift sigmoid_scale weighting_scheme logit_mean logit_std mode_scale "
        "min_timestep max_timestep preserve_distribution_shape num_timestep_buckets show_timesteps network_module "
        "network_dim network_alpha network_args network_dropout network_weights dim_from_weights scale_weight_norms "
        "base_weights base_weights_multiplier training_comment no_metadata output_dir output_name save_every_n_epochs "
        "save_every_n_steps save_last_n_epochs save_last_n_steps save_last_n_epochs_state save_last_n_steps_state "
        "save_state save_state_on_train_end resume metadata_title metadata_author metadata_description "
        "metadata_license metadata_tags metadata_reso metadata_arch sample_prompts sample_at_first "
        "sample_every_n_epochs sample_every_n_steps logging_dir log_with log_prefix log_tracker_name "
        "log_tracker_config wandb_run_name wandb_api_key log_config fp8_t5 flash_attn xformers flash3",
        "ours": "explain "
        "ckpt_dir dit_dtype t5_dtype t5_tokenizer clip_dtype device one_frame_legacy_indices one_frame_loss "
        "use_stale_caches overwrite "
        "one_frame_target_range one_frame_layout alpha stop_after_skipped_steps sample_solver cpu_noise exact_size "
        "reasoning_frames reasoning_steps pin_controls control_resolution no_resize_control preview vae_backend "
        "validation_split validate_every_n_steps validate_every_n_epochs validation_levels dit_backend memory",
        "refused": "force_v2_1_time_embedding dit_high_noise timestep_boundary offload_inactive_dit sage_attn "
        "dynamo_backend dynamo_mode dynamo_fullgraph dynamo_dynamic ddp_timeout "
        "ddp_gradient_as_bucket_view ddp_static_graph huggingface_repo_id "
        "huggingface_repo_type huggingface_path_in_repo huggingface_token huggingface_repo_visibility "
        "save_state_to_huggingface resume_from_huggingface async_upload",
        "ignored": "vae_cache_cpu split_attn block_swap_h2d_only block_swap_ring_size disable_numpy_memmap "
        "img_in_txt_in_offloading guidance_scale",
    },
    "wan_generate_video": {
        "works": "task dit vae t5 clip lora_weight lora_multiplier prompt negative_prompt video_size infer_steps "
        "flow_shift guidance_scale seed cpu_noise sample_solver image_path end_image_path one_frame_inference "
        "control_image_path control_image_mask_path save_path output_type latent_path no_metadata from_file "
        "interactive device attn_mode "
        "vae_dtype ckpt_dir save_merged_model include_patterns exclude_patterns fp8 fp8_scaled fp8_fast fp8_t5 "
        "blocks_to_swap use_pinned_memory_for_block_swap cfg_skip_mode cfg_apply_ratio slg_mode slg_layers slg_scale "
        "slg_start slg_end compile compile_backend compile_mode compile_dynamic compile_fullgraph "
        "compile_cache_size_limit",
        "ours": "explain recipe sweep image_folder preview memory reasoning_frames reasoning_steps pin_controls "
        "control_resolution no_resize_control dit_backend vae_backend separate_passes cuda_allow_tf32 "
        "cuda_cudnn_benchmark one_frame_layout alpha exact_size dit_dtype t5_dtype t5_tokenizer clip_dtype",
        "refused": "guidance_scale_high_noise "
        "compile_args trim_tail_frames "
        "control_path dit_high_noise lora_weight_high_noise lora_multiplier_high_noise timestep_boundary "
        "offload_inactive_dit lazy_loading force_v2_1_time_embedding",
        "ignored": "lycoris video_length fps vae_cache_cpu disable_numpy_memmap video_path",
    },
}


def names(script: str, *kinds: str) -> list[str]:
    return " ".join(FLAGS[script][kind] for kind in kinds).split()


def visible(script: str) -> dict[str, argparse.Action]:
    """The options that --help shows, by name."""
    actions = SCRIPTS[script].build_parser()._actions
    return {action.dest: action for action in actions if action.help != argparse.SUPPRESS and action.dest != "help"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_has_the_options_of_the_table_and_no_others(script):
    assert sorted(visible(script)) == sorted(names(script, "works", "ours"))
    for kind, expected in ((cli._Refuse, "refused"), (cli._Ignore, "ignored")):
        actions = [action for action in SCRIPTS[script].build_parser()._actions if type(action) is kind]
        assert sorted(action.option_strings[0] for action in actions) == sorted(
            f"--{n}" for n in names(script, expected)
        )
        assert all(len(action.const.split()) >= 4 for action in actions)  # a reason


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_table_holds_every_flag_of_the_reference_and_those_of_one_frame_work(script):
    recorded = json.loads((RECORDINGS / "musubi_tuner_flags.json").read_text(encoding="utf-8"))[script]
    assert sorted(recorded["one_frame"] + recorded["other"]) == sorted(names(script, "works", "refused", "ignored"))
    assert set(recorded["one_frame"]) <= set(names(script, "works"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_grouped_and_explains_every_option(script):
    parser = SCRIPTS[script].build_parser()
    assert all(action.help and len(action.help) > 4 for action in visible(script).values())
    ungrouped = {action.dest for action in parser._optionals._group_actions if action.help != argparse.SUPPRESS}
    assert ungrouped <= {"help", "config_file"}
    groups = [group for group in parser._action_groups if group._group_actions]
    assert all(f"\n{group.title}:\n" in parser.format_help() for group in groups)


BASE = {
    "wan_cache_latents": "--dataset_config x.toml --one_frame",
    "wan_cache_text_encoder_outputs": "--dataset_config x.toml",
    "wan_train_network": "--dataset_config x.toml --output_dir out --output_name x",
    "wan_generate_video": "--save_path out --from_file x.txt",
}
# Files that are opened by Python alone, and named in no other file but as ASCII.
ANY_BYTES = {"config_file", "recipe", "save_path", "from_file"}
ANY_BYTES |= {"image_path", "end_image_path", "control_image_path", "control_image_mask_path"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_text_that_is_no_utf8_is_refused_by_every_flag_that_can_not_take_it(script):
    for name, action in visible(script).items():
        if action.nargs == 0 or action.choices or action.type not in (str, Path) or name in ANY_BYTES:
            continue
        for text, words in (("a\udcff", "bytes that are not UTF-8 text"), ("a\0", "a zero byte")):
            with pytest.raises(ConfigError) as caught:
                SCRIPTS[script].main([*BASE[script].split(), f"--{name}", text])
            assert str(caught.value).startswith(f"--{name} {text}: holds {words}; "), caught.value


SECTIONS = {
    section
    for kind in (
        *(wan_cache_latents.Options, wan_cache_text_encoder_outputs.Options, TrainingModels, TrainingOptions),
        *(GenerationOptions, GenerationModels, MergedModelConfig, CheckConfig, wan_dataset.SheetOptions),
    )
    for section in cli._sections_of(kind)
}
# What files of other tools and command lines broke on, besides any other text.
LETTERS = st.text(
    st.sampled_from("\u00a0\u0085\u00ad\u3000\u2028\\\"'\n\r\t\x00\x1b\x7f#,[]{}=-_.x猫🐈 u0"), max_size=8
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5) | LETTERS | LETTERS.map(lambda text: f"--{text}")
VALUES = {
    bool: st.booleans(),
    int: st.integers(-(2**70), 2**70),
    float: st.floats(allow_nan=False),
    str: TEXT,
    Path: TEXT.filter(lambda text: "\0" not in text).map(Path),
}


def settings_of(section: type) -> st.SearchStrategy[dict[str, object]]:
    """Any values of the options of a section, valid or not, but those that no command line could give."""
    hints, found = get_type_hints(section), {}
    for field, declared in declared_options(section):
        kind, many = cli.value_type(hints[field.name])
        one = st.sampled_from([*declared.choices]) if declared.choices else VALUES[kind]
        size = declared.argparse_keywords.get("nargs")
        many_of = st.lists(one, min_size=size or 0, max_size=size or 3).map(tuple)
        found[field.name] = many_of if many else one
        if field.default is None:
            found[field.name] = st.none() | found[field.name]
    return st.fixed_dictionaries(found)


@pytest.mark.parametrize("section", sorted(SECTIONS, key=lambda one: one.__qualname__))
@hypothesis.settings(max_examples=30, deadline=None, suppress_health_check=[*hypothesis.HealthCheck])
@hypothesis.given(data=st.data())
def test_every_value_of_every_flag_is_read_from_the_settings_file_as_it_was_written(section, tmp_path, data):
    made = object.__new__(section)  # past its rules, which hold for its values however they were read
    vars(made).update(data.draw(settings_of(section)))
    path = tmp_path / "run.toml"
    path.write_text(cli.to_toml(made), encoding="utf-8")
    parser = cli.Parser()
    cli.add_fields(parser, section)
    parser.read_options_from("--config_file")
    args = parser.parse_args(["--config_file", str(path)])
    names = {field.name: flag_name(field) for field, _ in declared_options(section)}
    assert {name: getattr(args, flag) for name, flag in names.items()} == {name: vars(made)[name] for name in names}
