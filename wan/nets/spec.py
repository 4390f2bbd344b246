"""Constants of the Wan2.1 networks, and the dimensions of a DiT, read from the names and shapes of a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from utils.errors import ConfigError

TEXT_LENGTH = 512  # text tokens the DiT sees, padding included
CLIP_TOKENS = 257  # tokens of one CLIP image: the class token and 16 x 16 patches
LATENT_CHANNELS = 16  # of the VAE, and of the velocity that the DiT predicts
VAE_STRIDE = 8  # pixels per latent pixel, each side
TIME_STRIDE = 4  # video frames per latent frame, but for the first, which holds one
MASK_CHANNELS = TIME_STRIDE  # of a condition, in front of its latents: one per video frame of a latent frame, 1 = given
PATCH = (1, 2, 2)  # latent frames, rows and columns per token
HEAD_DIM = 128  # in every published Wan model
TRAINING_TIMESTEPS = 1000  # noise levels of Wan's training: the DiT is told 1000 times the noise level

ModelType = Literal["t2v", "i2v", "flf2v"]
CLIP_IMAGES: dict[ModelType, int] = {"t2v": 0, "i2v": 1, "flf2v": 2}


@dataclass(frozen=True)
class DiTSpec:
    """Dimensions of a Wan2.1 DiT; everything the shapes of a checkpoint do not tell is the same in all of them."""

    model_type: ModelType
    dim: int
    ffn_dim: int
    num_layers: int
    in_dim: int  # noisy latent channels; i2v and flf2v add mask channels and the latent channels of the condition
    text_dim: int
    image_dim: int | None = None  # width of the CLIP features; None without an image embedding
    out_dim: int = LATENT_CHANNELS
    freq_dim: int = 256
    eps: float = 1e-6

    @property
    def num_heads(self) -> int:
        return self.dim // HEAD_DIM

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> "DiTSpec":
        """Read the spec from official key names (docs/formats.md#dit-keys, no prefix) and their shapes.

        Raises ConfigError when this is not a Wan DiT, or one of another family than Wan2.1 T2V, I2V and FLF2V.
        """

        def shape(key: str, rank: int = 2) -> tuple[int, ...]:
            if len(shapes.get(key, ())) != rank:
                raise ConfigError(
                    f"not a Wan DiT in the original layout: '{key}' is missing or no {rank}-d tensor; use a Wan2.1 DiT"
                )
            return tuple(shapes[key])

        dim, in_dim, *patch = shape("patch_embedding.weight", rank=5)
        if tuple(patch) != PATCH or dim % HEAD_DIM:
            raise ConfigError(f"not a Wan DiT: patch_embedding.weight is {[dim, in_dim, *patch]}; use a Wan2.1 DiT")
        has_image = "img_emb.proj.0.weight" in shapes
        _, freq_dim = shape("time_embedding.0.weight")
        out_dim = shape("head.head.weight")[0] // (PATCH[0] * PATCH[1] * PATCH[2])
        _refuse_other_families(in_dim, out_dim, has_image, is_vace=any(key.startswith("vace_") for key in shapes))
        blocks = {key.split(".")[1] for key in shapes if key.startswith("blocks.")}
        return cls(
            model_type=("flf2v" if "img_emb.emb_pos" in shapes else "i2v") if has_image else "t2v",
            dim=dim,
            ffn_dim=shape("blocks.0.ffn.0.weight")[0],
            num_layers=len(blocks),
            in_dim=in_dim,
            text_dim=shape("text_embedding.0.weight")[1],
            image_dim=shape("img_emb.proj.0.weight", rank=1)[0] if has_image else None,
            out_dim=out_dim,
            freq_dim=freq_dim,
        )


def _refuse_other_families(in_dim: int, out_dim: int, has_image: bool, is_vace: bool) -> None:
    with_condition = 2 * LATENT_CHANNELS + MASK_CHANNELS
    if (
        not is_vace
        and out_dim == LATENT_CHANNELS
        and (in_dim, has_image) in {(LATENT_CHANNELS, False), (with_condition, True)}
    ):
        return
    if is_vace:
        kind = "a VACE model"
    elif out_dim != LATENT_CHANNELS:
        kind = f"a model with {out_dim} latent channels, such as Wan2.2 5B,"
    elif in_dim == with_condition:
        kind = "a Wan2.2 A14B image-to-video model (no image embedding)"
    elif in_dim == 48:
        kind = "a model with 48 input channels, such as Fun-Control,"
    else:
        kind = f"a model with {in_dim} input channels and {'an' if has_image else 'no'} image embedding"
    raise ConfigError(f"{kind} is not supported; use the weights of Wan2.1 I2V, FLF2V or T2V")
