"""Merging LoRA files into the weights of a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from utils.errors import ConfigError
from utils.text import one_line
from wan.files.dit_names import lora_name
from wan.lora.files import LoRAFile
from wan.lora.module import add_delta


@dataclass(frozen=True)
class LoRAMatch:
    """The modules of a LoRA file, matched with the parameters of a model."""

    weights: dict[str, str]  # `blocks.0.self_attn.q.weight` -> `lora_unet_blocks_0_self_attn_q`
    unmatched: tuple[str, ...]  # modules of the file of which the model lacks all, or `<module>.bias` and the like


def check_lora(lora: LoRAFile, shapes: Mapping[str, Sequence[int]]) -> LoRAMatch:
    """Match a file with the tensors of a DiT (official names -> shapes), of which a header is enough.

    ConfigError when nothing matches or a shape differs; modules without a counterpart are only reported. So is the
    first layer of a LoRA for T2V, whose fewer input channels don't keep the rest of it from working on I2V.
    """
    weights, missing = {}, {(name, leaf) for name, module in lora.modules.items() for leaf in module.shapes}
    for weight in shapes:
        parent, _, leaf = weight.rpartition(".")
        if (lora_name(parent), leaf) in missing and not _other_inputs(parent, leaf, shapes[weight], lora):
            weights[weight] = lora_name(parent)
            missing.remove((lora_name(parent), leaf))
    if not weights:
        raise ConfigError(
            f"{lora.path}: none of its {len(lora.modules)} modules is in the model, "
            f"e.g. {one_line(min(lora.modules))}; use a LoRA trained on this kind of model"
        )
    for weight, name in weights.items():
        wanted = lora.modules[name].shapes[weight.rpartition(".")[2]]
        if tuple(shapes[weight]) != wanted:
            raise ConfigError(
                f"{lora.path}: {name} is for a weight {list(wanted)}, the model has {list(shapes[weight])}; "
                "use a LoRA trained on a model of this size"
            )
    matched = set(weights.values())
    return LoRAMatch(weights, tuple(sorted({f"{name}.{leaf}" if name in matched else name for name, leaf in missing})))


def _other_inputs(parent: str, leaf: str, shape: Sequence[int], lora: LoRAFile) -> bool:
    found = lora.modules[lora_name(parent)].shapes[leaf]
    return f"{parent}.{leaf}" == "patch_embedding.weight" and found[:1] == shape[:1] and found[1:2] != shape[1:2]


class Merger:
    """Merges LoRA files into weights as they are loaded: `merger(name, weight) -> weight`.

    Checked against the tensors of the model at once, before any weights load. Files are added in their order, in
    float32; the sum is rounded once.
    """

    def __init__(self, loras: Sequence[tuple[LoRAFile, float]], shapes: Mapping[str, Sequence[int]]):
        self._loras = [(lora, multiplier, check_lora(lora, shapes)) for lora, multiplier in loras]
        self._merged: set[str] = set()
        self._squares = [[0.0, 0.0] for _ in loras]  # per file: of all deltas, and of the weights they were added to

    @property
    def names(self) -> list[str]:
        """Official names of the weights that are changed, whatever the multipliers."""
        return list(dict.fromkeys(name for _, _, match in self._loras for name in match.weights))

    def __call__(self, weight_name: str, weight: Tensor) -> Tensor:
        """weight: [out, in] under its official name, or a bias etc.; returned on its device in its dtype."""
        merged, before = weight, None
        for (lora, multiplier, match), squares in zip(self._loras, self._squares, strict=True):
            if weight_name in match.weights:
                module, leaf = lora.modules[match.weights[weight_name]], weight_name.rpartition(".")[2]
                merged = merged.float()
                delta = module.change(merged, leaf, multiplier)
                before = float(merged.norm()) if before is None else before
                squares[0] += float(delta.norm()) ** 2
                squares[1] += before**2
                merged = add_delta(merged, delta)
                self._merged.add(weight_name)
        return merged.to(weight.dtype)

    def report(self) -> list[str]:
        """One line per file: modules merged so far, modules that the model lacks, relative norm of the delta.

        ||dW||/||W|| is over all tensors that the file has deltas for; W is without any of the files.
        """
        lines = []
        for (lora, multiplier, match), (delta, before) in zip(self._loras, self._squares, strict=True):
            done = len({match.weights[name] for name in self._merged & match.weights.keys()})
            line = f"{lora.path.name} x {multiplier:g}: merged {done} of {len(lora.modules)} modules"
            if before:
                line += f", ||dW||/||W|| = {(delta / before) ** 0.5:.2g}"
            if match.unmatched:
                line += f"; not in this model: {len(match.unmatched)}, e.g. {one_line(match.unmatched[0])}"
            lines.append(line)
        return lines
