"""Which model a checkpoint is, and the task defaults, against the manifests of the published files and the spec."""

from dataclasses import replace

import pytest

from tests.helpers import manifest_shapes
from utils.errors import ConfigError
from wan.models.tasks import TASKS, UNSUPPORTED_TASKS, resolve_task
from wan.nets.spec import DiTSpec

T2V_SHAPES = {
    "patch_embedding.weight": (256, 16, 1, 2, 2),
    "text_embedding.0.weight": (256, 32),
    "time_embedding.0.weight": (256, 64),
    "head.head.weight": (64, 256),
    **{f"blocks.{i}.ffn.0.weight": (512, 256) for i in range(11)},
}
I2V_SHAPES = T2V_SHAPES | {"patch_embedding.weight": (256, 36, 1, 2, 2), "img_emb.proj.0.weight": (48,)}
FLF2V_SHAPES = I2V_SHAPES | {"img_emb.emb_pos": (1, 514, 48)}
T2V, I2V, FLF2V = (DiTSpec.from_shapes(shapes) for shapes in (T2V_SHAPES, I2V_SHAPES, FLF2V_SHAPES))


def test_a_spec_holds_what_the_shapes_say():
    assert DiTSpec("t2v", 256, 512, num_layers=11, in_dim=16, text_dim=32, freq_dim=64) == T2V
    assert replace(T2V, model_type="i2v", in_dim=36, image_dim=48) == I2V
    assert replace(I2V, model_type="flf2v") == FLF2V
    assert T2V.num_heads == 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("t2v-1.3B", DiTSpec("t2v", 1536, 8960, num_layers=30, in_dim=16, text_dim=4096)),
        ("t2v-14B", DiTSpec("t2v", 5120, 13824, num_layers=40, in_dim=16, text_dim=4096)),
        ("i2v-14B", DiTSpec("i2v", 5120, 13824, num_layers=40, in_dim=36, text_dim=4096, image_dim=1280)),
        ("flf2v-14B", DiTSpec("flf2v", 5120, 13824, num_layers=40, in_dim=36, text_dim=4096, image_dim=1280)),
    ],
)
def test_published_checkpoints_are_recognised_as_their_task(name, expected):
    spec = DiTSpec.from_shapes(manifest_shapes(f"dit_{name}"))
    assert spec == expected
    assert resolve_task(None, spec).name == name


def test_the_published_wan22_i2v_checkpoint_is_refused():
    with pytest.raises(ConfigError, match=r"Wan2\.2 A14B image-to-video"):
        DiTSpec.from_shapes(manifest_shapes("dit_i2v-A14B"))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (T2V_SHAPES | {"patch_embedding.weight": (256, 36, 1, 2, 2)}, r"Wan2\.2 A14B"),
        (I2V_SHAPES | {"patch_embedding.weight": (256, 48, 1, 2, 2)}, "48 input channels, such as Fun-Control"),
        (I2V_SHAPES | {"patch_embedding.weight": (256, 16, 1, 2, 2)}, "16 input channels and an image embedding"),
        (T2V_SHAPES | {"head.head.weight": (192, 256)}, r"48 latent channels, such as Wan2\.2 5B"),
        (T2V_SHAPES | {"vace_blocks.0.modulation": (1, 6, 256)}, "VACE"),
        (T2V_SHAPES | {"patch_embedding.weight": (256, 16, 1, 4, 4)}, r"\[256, 16, 1, 4, 4\]"),
        (T2V_SHAPES | {"patch_embedding.weight": (200, 16, 1, 2, 2)}, r"\[200, 16, 1, 2, 2\]"),
        *(
            ({key: shape for key, shape in T2V_SHAPES.items() if key != missing}, missing)
            for missing in T2V_SHAPES
            if not missing.startswith("blocks.") or missing.startswith("blocks.0.")
        ),
        ({"double_blocks.0.img_attn_qkv.weight": (9216, 3072)}, "patch_embedding.weight"),
    ],
)
def test_other_models_are_refused_in_one_line_that_says_what_they_are(shapes, message):
    with pytest.raises(ConfigError, match=message) as error:
        DiTSpec.from_shapes(shapes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "steps", "clip_images", "negative_start"),
    [
        ("i2v-14B", 40, 1, "色调"),
        ("flf2v-14B", 40, 2, "镜头切换，色调"),
        ("t2v-14B", 50, 0, "色调"),
        ("t2v-1.3B", 50, 0, "色调"),
    ],
)
def test_task_defaults_are_those_of_the_spec(name, steps, clip_images, negative_start):
    task = TASKS[name]
    assert (task.name, task.steps, task.clip_images) == (name, steps, clip_images)
    assert (task.flow_shift, task.guidance_scale) == (5.0, 5.0)
    assert task.negative_prompt.startswith(negative_start)
    assert task.negative_prompt.endswith("，倒着走")


def test_only_i2v_at_480p_has_a_smaller_default_shift():
    assert TASKS["i2v-14B"].default_shift(832, 480) == TASKS["i2v-14B"].default_shift(480, 832) == 3.0
    assert TASKS["i2v-14B"].default_shift(1280, 720) == TASKS["i2v-14B"].default_shift(480, 480) == 5.0
    assert TASKS["flf2v-14B"].default_shift(832, 480) == TASKS["t2v-14B"].default_shift(832, 480) == 5.0


def test_without_a_name_the_checkpoint_decides_the_task():
    assert [resolve_task(None, spec).name for spec in (T2V, I2V, FLF2V)] == ["t2v-14B", "i2v-14B", "flf2v-14B"]
    assert resolve_task(None, replace(T2V, dim=1536)).name == "t2v-1.3B"


def test_a_name_of_the_right_model_type_fits_checkpoints_of_any_size():
    assert resolve_task("i2v-14B", I2V) is TASKS["i2v-14B"]
    assert resolve_task("t2v-1.3B", T2V) is TASKS["t2v-1.3B"]


def test_a_checkpoint_of_another_model_type_is_an_error_with_both_ways_out():
    with pytest.raises(ConfigError) as error:
        resolve_task("i2v-14B", T2V)
    assert str(error.value) == (
        "--task i2v-14B: the checkpoint is of the kind t2v (16 input channels, 0 CLIP images); "
        "use --task t2v-14B or the i2v weights"
    )
    with pytest.raises(ConfigError, match="use --task flf2v-14B or the i2v weights"):
        resolve_task("i2v-14B", FLF2V)


@pytest.mark.parametrize("name", ["t2i-14B", "t2v-1.3B-FC", "t2v-14B-FC", "i2v-14B-FC", "i2v-A14B", "t2v-A14B"])
def test_the_other_task_names_of_the_reference_are_errors_with_a_reason(name):
    assert name in UNSUPPORTED_TASKS
    with pytest.raises(ConfigError, match=f"--task {name}: .* is not supported; use "):
        resolve_task(name, I2V)


def test_a_misspelt_task_gets_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean 'i2v-14B'"):
        resolve_task("i2v-14b", I2V)
    with pytest.raises(ConfigError, match="use one of i2v-14B, flf2v-14B"):
        resolve_task("zzz", I2V)
