"""Tasks by name: their defaults, and which task a DiT file is for."""

from dataclasses import dataclass

from utils.errors import ConfigError, suggest
from utils.text import counted
from wan.nets.spec import CLIP_IMAGES, DiTSpec, ModelType

# The official negative prompt (Wan2.1, wan/configs/shared_config.py).
_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True)
class TaskSpec:
    """Defaults of a task name (docs/formats.md#tasks); what the user sets wins."""

    name: str
    model_type: ModelType
    steps: int
    flow_shift: float
    guidance_scale: float
    negative_prompt: str = _NEGATIVE_PROMPT
    dim: int | None = None  # width of the model that the name stands for; None: any that no other name stands for

    @property
    def clip_images(self) -> int:
        """How many images the CLIP features are made of."""
        return CLIP_IMAGES[self.model_type]

    def default_shift(self, width: int, height: int) -> float:
        """Schedule shift for an output of this size in pixels."""
        if self.model_type == "i2v" and {width, height} == {832, 480}:
            return 3.0  # what the official generate.py advises for 480p I2V
        return self.flow_shift


TASKS: dict[str, TaskSpec] = {
    task.name: task
    for task in (
        TaskSpec("i2v-14B", "i2v", steps=40, flow_shift=5.0, guidance_scale=5.0),
        TaskSpec(
            "flf2v-14B",
            "flf2v",
            steps=40,
            flow_shift=5.0,
            guidance_scale=5.0,
            negative_prompt="镜头切换，" + _NEGATIVE_PROMPT,
        ),
        TaskSpec("t2v-14B", "t2v", steps=50, flow_shift=5.0, guidance_scale=5.0),
        TaskSpec("t2v-1.3B", "t2v", steps=50, flow_shift=5.0, guidance_scale=5.0, dim=1536),
    )
}


UNSUPPORTED_TASKS: dict[str, str] = {
    "t2i-14B": "text-to-image is not supported; use --task i2v-14B or flf2v-14B, which take images",
    **dict.fromkeys(("t2v-1.3B-FC", "t2v-14B-FC", "i2v-14B-FC"), "Fun-Control is not supported; use --task i2v-14B"),
    **dict.fromkeys(("i2v-A14B", "t2v-A14B"), "Wan2.2 is not supported; use --task i2v-14B with Wan2.1 weights"),
}


def resolve_task(name: str | None, spec: DiTSpec) -> TaskSpec:
    """The task called `name`, or without a name the one the checkpoint was made for.

    Only the model type must fit: dimensions are free, so that small test models load under the published names.
    Raises ConfigError for an unknown or unsupported name and for a checkpoint of another model type.
    """
    of_type = {task.dim: task for task in TASKS.values() if task.model_type == spec.model_type}
    fitting = of_type.get(spec.dim, of_type[None])
    if name is None:
        return fitting
    if name in UNSUPPORTED_TASKS:
        raise ConfigError(f"--task {name}: {UNSUPPORTED_TASKS[name]}")
    if name not in TASKS:
        hint = suggest(name, TASKS) or f"; use one of {', '.join(TASKS)}"
        raise ConfigError(f"--task {name}: unknown task{hint}")
    task = TASKS[name]
    if task.model_type != spec.model_type:
        images = CLIP_IMAGES[spec.model_type]
        raise ConfigError(
            f"--task {name}: the checkpoint is of the kind {spec.model_type} ({spec.in_dim} input channels, "
            f"{counted(images, 'CLIP image')}); use --task {fitting.name} or the {task.model_type} weights"
        )
    return task
