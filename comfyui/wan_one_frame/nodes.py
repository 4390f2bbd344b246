"""The nodes: images and indices to a condition, the target to a picture, indices out of a LoRA file."""

import inspect
from typing import Any

import comfy.clip_vision
import comfy.latent_formats
import comfy.model_management
import comfy.utils
import folder_paths
import node_helpers
import nodes
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from .frames import PIXELS_PER_LATENT, Frames, LatentSpace, condition, from_metadata, parse, rope_at

CONTROLS, FRAMES = "WAN_ONE_FRAME_CONTROLS", "WAN_ONE_FRAME"
CATEGORY = "conditioning/wan one-frame"
Controls = tuple[tuple[Tensor, Tensor | None], ...]


class WanOneFrameControl:
    """A control image; several are chained in the order of `control_index`."""

    CATEGORY = CATEGORY
    RETURN_TYPES = (CONTROLS,)
    RETURN_NAMES = ("controls",)
    FUNCTION = "add"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        hidden = {"tooltip": "1 where the image is not to be used, as LoadImage gives it for transparent pixels"}
        return {
            "required": {"image": ("IMAGE",)},
            "optional": {"mask": ("MASK", hidden), "previous": (CONTROLS,)},
        }

    def add(self, image: Tensor, mask: Tensor | None = None, previous: Controls = ()) -> tuple[Controls]:
        if mask is not None and not mask.any():  # LoadImage gives one of zeros for an image without transparency
            mask = None
        return ((*previous, (image[:1, ..., :3], None if mask is None else mask[:1])),)


class WanOneFrame:
    """Conditions as in training, at any time indices."""

    CATEGORY = CATEGORY
    RETURN_TYPES = ("MODEL", "CONDITIONING", "CONDITIONING", "LATENT", FRAMES)
    RETURN_NAMES = ("model", "positive", "negative", "latent", "frames")
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        side = {"min": 16, "max": 8192, "step": 16}
        layout = {"default": "control_index=0,target_index=1", "tooltip": "as in --one_frame_inference"}
        return {
            "required": {
                **{"model": ("MODEL",), "positive": ("CONDITIONING",), "negative": ("CONDITIONING",), "vae": ("VAE",)},
                **{"controls": (CONTROLS,), "layout": ("STRING", layout)},
                **{"width": ("INT", {"default": 832, **side}), "height": ("INT", {"default": 480, **side})},
            },
            "optional": {"clip_vision": ("CLIP_VISION",)},
        }

    def make(
        self,
        model: Any,
        positive: Any,
        negative: Any,
        vae: Any,
        controls: Controls,
        layout: str,
        width: int,
        height: int,
        clip_vision: Any = None,
    ) -> tuple[Any, Any, Any, dict[str, Tensor], Frames]:
        frames = parse(layout)
        images = [_fitted(image, width, height, "area", "lanczos") for image, _ in controls]
        masks = [None if mask is None else _used(mask, width, height) for _, mask in controls]
        space = comfy.latent_formats.Wan21()
        latents, unknown = condition(
            frames, images, masks, LatentSpace(vae.encode, space.process_in, space.process_out)
        )
        values = {"concat_latent_image": latents, "concat_mask": unknown}
        if clip_vision is not None:
            values["clip_vision_output"] = _features(model, clip_vision, [controls[end][0] for end in frames.ends])
        shape = (1, 16, len(frames.times), height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
        return (
            _placed(model, frames),
            node_helpers.conditioning_set_values(positive, values),
            node_helpers.conditioning_set_values(negative, values),
            {"samples": torch.zeros(shape, device=comfy.model_management.intermediate_device())},
            frames,
        )


class WanOneFrameDecode:
    """The target as a picture."""

    CATEGORY = CATEGORY
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "decode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"samples": ("LATENT",), "vae": ("VAE",), "frames": (FRAMES,)}}

    def decode(self, samples: dict[str, Tensor], vae: Any, frames: Frames) -> tuple[Tensor]:
        slot = frames.target_slot
        # An image of its own, or the last picture of the video up to it
        first = slot if frames.layout == "independent" else 0
        pictures = vae.decode(samples["samples"][:, :, first : slot + 1])
        return (pictures.reshape(-1, *pictures.shape[-3:])[-1:],)


class WanOneFrameLora:
    """A LoRA, and the indices and size that its file says it was trained for."""

    CATEGORY = CATEGORY
    RETURN_TYPES = ("MODEL", "STRING", "INT", "INT")
    RETURN_NAMES = ("model", "layout", "width", "height")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        strength = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}
        names = folder_paths.get_filename_list("loras")
        return {"required": {"model": ("MODEL",), "lora_name": (names,), "strength_model": ("FLOAT", strength)}}

    def load(self, model: Any, lora_name: str, strength_model: float) -> tuple[Any, str, int, int]:
        with safe_open(folder_paths.get_full_path_or_raise("loras", lora_name), "pt") as file:
            metadata = file.metadata() or {}
        try:
            frames, (width, height) = from_metadata(metadata)
        except ValueError as error:
            raise ValueError(f"{lora_name}: {error}") from None
        (model,) = nodes.LoraLoaderModelOnly().load_lora_model_only(model, lora_name, strength_model)
        return model, str(frames), width, height


def _fitted(image: Tensor, width: int, height: int, shrink: str, grow: str) -> Tensor:
    """An image [1, H, W, C] resized until it fills the size, and cropped in its middle."""
    method = shrink if image.shape[1] >= height and image.shape[2] >= width else grow
    fitted: Tensor = comfy.utils.common_upscale(image.movedim(-1, 1), width, height, method, "center")
    return fitted.movedim(1, -1)


def _used(mask: Tensor, width: int, height: int) -> Tensor:
    """ComfyUI's mask [1, H, W] of what is hidden -> [1, height, width], 1 where the image is used."""
    return 1 - _fitted(mask[..., None], width, height, "area", "bilinear")[..., 0].clamp(0, 1)


def _features(model: Any, clip_vision: Any, images: list[Tensor]) -> Any:
    """CLIP features of whole images: of the first, or of both for a model that takes two (flf2v has `emb_pos`)."""
    embedding = getattr(model.get_model_object("diffusion_model"), "img_emb", None)
    if getattr(embedding, "emb_pos", None) is None:
        return clip_vision.encode_image(_square(clip_vision, images[0]), crop=False)
    outputs = [clip_vision.encode_image(_square(clip_vision, image), crop=False) for image in images]
    both = comfy.clip_vision.Output()
    both.penultimate_hidden_states = torch.cat([output.penultimate_hidden_states for output in outputs], dim=-2)
    return both


def _square(clip_vision: Any, image: Tensor) -> Tensor:
    """An image at the size of CLIP's input, without antialiasing, as Wan's own code resizes it."""
    side = getattr(clip_vision, "image_size", 224)
    return F.interpolate(image.movedim(-1, 1), (side, side), mode="bicubic", align_corners=False).movedim(1, -1)


def _placed(model: Any, frames: Frames) -> Any:
    """The model with its latent frames at the time indices of `frames`."""
    if frames.times == tuple(range(len(frames.times))):
        return model
    network = model.get_model_object("diffusion_model")
    encode = getattr(type(network), "rope_encode", None)  # the class's own: a clone may be placed already
    if encode is None or "t_start" not in inspect.signature(encode).parameters:
        raise ValueError(f"{frames}: this model or version of ComfyUI can't place frames in time; update ComfyUI")
    placed = model.clone()
    placed.add_object_patch("diffusion_model.rope_encode", rope_at(frames.times, encode.__get__(network)))
    return placed


NODE_CLASS_MAPPINGS: dict[str, type] = {
    node.__name__: node for node in (WanOneFrame, WanOneFrameControl, WanOneFrameDecode, WanOneFrameLora)
}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "WanOneFrame": "Wan one-frame",
    "WanOneFrameControl": "Wan one-frame control image",
    "WanOneFrameDecode": "Wan one-frame decode",
    "WanOneFrameLora": "Wan one-frame LoRA",
}
