"""The average of several LoRA files of one training, in which later ones count more: `wan_lora.py ema`."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from utils.errors import ConfigError
from utils.options import Section, option
from utils.text import one_line
from wan.lora.files import LoRAFile, read_lora
from wan.lora.module import LoRAModule
from wan.lora.tools import check_out, save_modules

log = logging.getLogger(__name__)

_DIGITS = 20  # a number of steps has fewer
_WIDEST = 0.288  # nearly a power function of exponent 0, which averages all files alike


@dataclass(frozen=True)
class EMAConfig(Section):
    """average"""

    beta: float | None = option(
        None, minimum=0, below=1, help="share of the average so far when a file is added; default 0.95"
    )
    beta2: float | None = option(
        None, minimum=0, below=1, help="that share at the last file; it changes evenly from --beta"
    )
    sigma_rel: float | None = option(
        None,
        above=0,
        maximum=_WIDEST,
        rule=f"must be above 0 and at most {_WIDEST}; try 0.15",
        help="width of a power function instead of --beta, relative to the whole training (EDM2), e.g. 0.15",
    )
    no_sort: bool = option(False, help="take the files in the order given, not by their steps or times of change")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma_rel is not None and (self.beta, self.beta2) != (None, None):
            raise ConfigError("--sigma_rel takes the place of --beta and --beta2; give one or the other")

    def betas(self, count: int) -> list[float]:
        """The share of the average so far when each of `count` files is added; 0 at the first.

        Of --sigma_rel: (1 - 1/t)^(gamma + 1) at the t-th file, the power function of EDM2 (arXiv 2312.02696, section
        3.1); the files stand for equal parts of the training.
        """
        if self.sigma_rel is not None:
            exponent = _gamma(self.sigma_rel) + 1
            return [float((1 - 1 / t) ** exponent) for t in range(1, count + 1)]
        first = 0.95 if self.beta is None else self.beta
        last = first if self.beta2 is None else self.beta2
        return [0.0, *np.linspace(first, last, count - 1).tolist()]


def _gamma(sigma_rel: float) -> float:
    """The largest solution of sigma_rel = (gamma + 1)^0.5 (gamma + 2)^-1 (gamma + 3)^-0.5 (the same section)."""
    inverse = sigma_rel**-2  # (gamma + 2)^2 (gamma + 3) = inverse (gamma + 1)
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def average(sources: Sequence[Path], out: Path, config: EMAConfig) -> None:
    """Write the moving average of the tensors of several LoRA files, float32.

    state = beta * state + (1 - beta) * file, from the first on, tensor by tensor: down and up matrices each on their
    own. ConfigError for fewer than two files, and for files that differ in more than numbers.
    """
    if len(sources) < 2:
        raise ConfigError("LORA: one file has no average; give two or more of one training")
    check_out(out)
    paths = list(sources) if config.no_sort else _in_order(sources)
    betas = config.betas(len(paths))
    state, last = dict[str, LoRAModule](), read_lora(paths[-1], "LORA")
    layouts = set()
    for path, beta in zip(paths, betas, strict=True):
        lora = last if path == paths[-1] else read_lora(path, "LORA")
        layouts.add(lora.metadata.get("ss_one_frame"))
        state = _blend(state, lora, beta) if state else _as_float32(lora)
    if len(layouts) > 1:
        log.warning("the files were trained at different indices (%s); those of the last are stored", _listed(layouts))
    weights = _weights(betas)
    for path, weight in zip(paths, weights, strict=True):
        log.info("%5.1f %% %s", 100 * weight, path)
    parts = [[path.name, round(weight, 6)] for path, weight in zip(paths, weights, strict=True)]
    save_modules(out, state, last.metadata | {"ss_average_of": json.dumps(parts)})


def _in_order(paths: Sequence[Path]) -> list[Path]:
    """The files by the steps that their metadata name, or by time of change where one of them names none."""
    steps = [read_lora(path, "LORA").metadata.get("ss_steps", "") for path in paths]
    if all(text.isdecimal() and len(text) < _DIGITS for text in steps):
        log.info("in the order of their steps")
        return [path for _, path in sorted(zip(map(int, steps), paths, strict=True), key=lambda pair: pair[0])]
    log.info("in the order in which they were changed; --no_sort takes them as given")
    return sorted(paths, key=lambda path: path.stat().st_mtime_ns)


def _as_float32(lora: LoRAFile) -> dict[str, LoRAModule]:
    return {
        name: replace(module, parts={part: tensor.float() for part, tensor in module.parts.items()})
        for name, module in lora.modules.items()
    }


def _blend(state: dict[str, LoRAModule], lora: LoRAFile, beta: float) -> dict[str, LoRAModule]:
    """beta * state + (1 - beta) * lora. ConfigError unless both have the same tensors."""
    for name in state.keys() | lora.modules.keys():
        if _form(state.get(name)) != _form(lora.modules.get(name)):
            raise ConfigError(
                f"{lora.path}: {one_line(name)} is of another size, alpha or kind than in the files before; "
                "give files of one training"
            )
    return {
        name: replace(module, parts={part: tensor.lerp(module.parts[part], beta) for part, tensor in new.parts.items()})
        for name, module, new in ((name, state[name], module) for name, module in _as_float32(lora).items())
    }


def _form(module: LoRAModule | None) -> object:
    """All that two modules have to share to be averaged."""
    if module is None:
        return None
    return {part: tensor.shape for part, tensor in module.parts.items()}, module.alpha


def _weights(betas: Sequence[float]) -> list[float]:
    """The share of each file in the average."""
    return [(1 - beta) * math.prod(betas[number + 1 :]) for number, beta in enumerate(betas)]


def _listed(layouts: set[str | None]) -> str:
    return " and ".join(sorted(map(str, layouts)))
