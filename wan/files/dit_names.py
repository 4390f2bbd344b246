"""Names of a DiT's modules: official ones, diffusers', and the form with underscores that LoRA files use."""

import re

PREFIX = "lora_unet_"

# Official names -> diffusers', within a block and outside of the blocks.
IN_BLOCK = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "norm3": "norm2",
}
OUTSIDE = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
    "head": "head",  # its modulation only, which diffusers' files can't carry
}
# Either tool's names with underscores -> official ones
_DOTTED_IN_BLOCK, _DOTTED_OUTSIDE = (
    {name.replace(".", "_"): ours for ours, theirs in table.items() for name in (ours, theirs)}
    for table in (IN_BLOCK, OUTSIDE)
)


def lora_name(dotted: str) -> str:
    """`blocks.0.self_attn.q` -> `lora_unet_blocks_0_self_attn_q`."""
    return PREFIX + dotted.replace(".", "_")


def dotted_name(name: str) -> str | None:
    """`lora_unet_blocks_0_self_attn_q` -> `blocks.0.self_attn.q`; from diffusers' names, too. None: in no Wan2.1."""
    name = name.removeprefix(PREFIX)
    block = re.fullmatch(r"blocks_(\d+)(?:_(.+))?", name)
    if block is None:
        return _DOTTED_OUTSIDE.get(name)
    if block[2] is None:
        return f"blocks.{block[1]}"  # its modulation
    inner = _DOTTED_IN_BLOCK.get(block[2])
    return inner and f"blocks.{block[1]}.{inner}"


def diffusers_name(dotted: str) -> str | None:
    """`blocks.0.self_attn.q` -> `blocks.0.attn1.to_q`; None: no module with a weight of its own in diffusers."""
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", dotted)
    if block is None:
        return OUTSIDE.get(dotted)
    inner = IN_BLOCK.get(block[2])
    return inner and f"blocks.{block[1]}.{inner}"
