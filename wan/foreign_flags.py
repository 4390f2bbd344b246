"""Flags that musubi-tuner's scripts have and ours do not, each with the reason that the user is given."""

_NOT_YET = "is not supported yet; leave it out"
_VIDEO = "belongs to video output, which is not supported"
_WAN22 = "belongs to Wan2.2 models, which are not supported"
_FUN_CONTROL = "belongs to Fun-Control models, which are not supported"
_HUB = "uploading is not supported; leave it out and upload the finished files with `hf upload`"

_WAN22_FLAGS = dict.fromkeys(
    ("--dit_high_noise", "--timestep_boundary", "--offload_inactive_dit", "--force_v2_1_time_embedding"), _WAN22
)
_SHARED_IGNORED = {
    "--vae_cache_cpu": "the VAE here keeps no feature cache",
    "--disable_numpy_memmap": "numpy's memmap is not used",
}

TRAINING_REFUSED = {
    **_WAN22_FLAGS,
    "--sage_attn": "SageAttention has no backward pass; use --sdpa",
    **dict.fromkeys(
        ("--dynamo_backend", "--dynamo_mode", "--dynamo_fullgraph", "--dynamo_dynamic"),
        "accelerate's compiler is not used; use --compile and its options",
    ),
    **dict.fromkeys(
        (
            *("--huggingface_repo_id", "--huggingface_repo_type", "--huggingface_path_in_repo", "--huggingface_token"),
            *("--huggingface_repo_visibility", "--save_state_to_huggingface", "--async_upload"),
        ),
        _HUB,
    ),
    "--resume_from_huggingface": "downloading states is not supported; fetch the folder and give it to --resume",
    **dict.fromkeys(("--ddp_timeout", "--ddp_gradient_as_bucket_view", "--ddp_static_graph"), _NOT_YET),
}
TRAINING_IGNORED = {
    **_SHARED_IGNORED,
    "--split_attn": "items of a batch never attend to each other's padding here",
    "--img_in_txt_in_offloading": "it belongs to HunyuanVideo",
    "--guidance_scale": "it is HunyuanVideo's embedded guidance",
    "--block_swap_h2d_only": "swapped weights are never copied back here",
    "--block_swap_ring_size": "swapped blocks always share two buffers",
}
GENERATION_REFUSED = {
    **_WAN22_FLAGS,
    **dict.fromkeys(
        ("--lora_weight_high_noise", "--lora_multiplier_high_noise", "--guidance_scale_high_noise", "--lazy_loading"),
        _WAN22,
    ),
    "--control_path": _FUN_CONTROL,
    "--trim_tail_frames": _VIDEO,
    "--compile_args": "is an old form; use --compile_backend, --compile_mode, --compile_dynamic, --compile_fullgraph",
}
GENERATION_HINTS = {
    "--one_frame_auto_resize": "belongs to FramePack; here the picture has the shape of the start image anyway, see"
    " --exact_size",
    **dict.fromkeys(
        ("--video_sections", "--video_seconds", "--latent_window_size"),
        "belongs to FramePack; one-frame use makes one image, so leave it out",
    ),
}
GENERATION_IGNORED = {
    **_SHARED_IGNORED,
    "--lycoris": "LoHa and LoKr files are merged without the package",
    "--video_length": "one-frame use makes one image",
    "--fps": "one-frame use makes one image",
    "--video_path": "videos are not read",
}
