"""Which steps use classifier-free guidance, and skip-layer guidance on top (docs/formats.md#guidance)."""

from dataclasses import dataclass

from utils.errors import ConfigError
from utils.options import Section, option

_SKIP_MODES = ("early", "late", "middle", "early_late", "alternate", "none")


@dataclass(frozen=True)
class GuidanceConfig(Section):
    """guidance"""

    cfg_skip_mode: str = option(
        "none", help="which steps do without guidance when --cfg_apply_ratio is below 1", choices=_SKIP_MODES
    )
    cfg_apply_ratio: float | None = option(None, help="share of the steps that use guidance", minimum=0, maximum=1)
    separate_passes: bool = option(
        False,
        help="run the passes with and without the prompt one after the other instead of as one batch: less memory",
    )
    slg_mode: str | None = option(
        None,
        help="skip-layer guidance: a third pass (original), or in place of the second",
        choices=("original", "uncond"),
    )
    slg_layers: str | None = option(None, help="blocks that it skips, separated by commas, e.g. 9,10")
    slg_scale: float = option(3.0, help="strength of --slg_mode original")
    slg_start: float = option(0.0, help="share of the steps before skip-layer guidance")
    slg_end: float = option(0.3, help="share of the steps after which it stops")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cfg_skip_mode != "none" and self.cfg_apply_ratio is None:
            raise ConfigError(f"--cfg_skip_mode {self.cfg_skip_mode} needs --cfg_apply_ratio, e.g. 0.6")
        if not 0 <= self.slg_start <= self.slg_end <= 1:
            raise ConfigError(f"--slg_start {self.slg_start} --slg_end {self.slg_end}: use 0 <= start <= end <= 1")
        if self.slg_mode is not None and not self.skipped_blocks:
            raise ConfigError(f"--slg_mode {self.slg_mode} needs --slg_layers, e.g. 9")

    @property
    def skipped_blocks(self) -> frozenset[int]:
        """Block numbers of `slg_layers`. ConfigError for other words."""
        try:
            return frozenset(int(part) for part in (self.slg_layers or "").split(",") if part.strip())
        except ValueError:
            raise ConfigError(f"--slg_layers {self.slg_layers}: must be block numbers, e.g. 9,10") from None

    def check(self, blocks: int) -> None:
        """Raise ConfigError unless the DiT has the blocks that are to be skipped."""
        if wrong := sorted(number for number in self.skipped_blocks if not 0 <= number < blocks):
            raise ConfigError(f"--slg_layers {self.slg_layers}: the DiT has blocks 0 to {blocks - 1}, not {wrong[0]}")

    def guided_steps(self, steps: int) -> list[bool]:
        """One entry per step: True where it uses guidance."""
        if self.cfg_skip_mode == "none" or self.cfg_apply_ratio is None:
            return [True] * steps
        if self.cfg_skip_mode == "alternate":
            return _alternating(steps, self.cfg_apply_ratio)
        used = int(steps * self.cfg_apply_ratio)
        skipped = steps - used
        first = {"early": skipped, "late": 0, "early_late": skipped // 2, "middle": (steps - skipped) // 2}
        start = first[self.cfg_skip_mode]
        if self.cfg_skip_mode == "middle":
            return [not start <= step < start + skipped for step in range(steps)]
        return [start <= step < start + used for step in range(steps)]

    def skips_layers(self, step: int, steps: int) -> bool:
        """True when skip-layer guidance acts on this step (counted from 0), provided that the step is guided."""
        return self.slg_mode is not None and int(self.slg_start * steps) <= step < int(self.slg_end * steps)


def _alternating(steps: int, ratio: float) -> list[bool]:
    """Guide a step whenever the ratios of the steps so far add up to a whole one."""
    credit, guided = 0.0, []
    for _ in range(steps):
        credit += ratio
        guided.append(credit >= 1)
        credit -= credit >= 1
    return guided
