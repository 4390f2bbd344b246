"""Flags of the trained layers, and the keys of --network_args (docs/formats.md#trained-layers)."""

import ast
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from utils.errors import ConfigError, suggest
from utils.options import Section, option
from wan.lora.files import require_lora

# `--network_module` -> kind of network; lycoris.kohya says it by `--network_args algo=...`.
_MODULES = {
    "networks.lora_wan": "lora",
    "wan.lora": "lora",
    "networks.loha": "loha",
    "networks.lokr": "lokr",
    "lycoris.kohya": None,
}
_LARGEST_RANK = 1 << 14  # more than the widest layer of Wan2.1 14B (13824) has, which no rank above adds to
_KINDS = {"lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr"}


def _literal(text: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's about a backslash in a plain string; everyone writes regexes so
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError("is not a Python value") from None


def _number(text: str) -> float:
    value = _literal(text)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise ValueError("must be a number")
    return float(value)


def _ratio(text: str) -> float:
    if (value := _number(text)) <= 0:
        raise ValueError("must be above 0; try 16")
    return value


def _fraction(text: str) -> float:
    if not 0 <= (value := _number(text)) < 1:
        raise ValueError("must be at least 0 and below 1; try 0.1")
    return value


def _alpha(text: str) -> float:
    if (value := _number(text)) < 0:
        raise ValueError("must be 0 (same as the rank) or above")
    return value


def _rank(text: str) -> int:
    if not 1 <= (value := _number(text)) <= _LARGEST_RANK or value % 1:
        raise ValueError(f"must be a whole number of at least 1 and at most {_LARGEST_RANK}")
    return int(value)


def _factor(text: str) -> int:
    return -1 if text.strip() == "-1" else _rank(text)


def _switch(text: str) -> bool:
    try:
        return {"true": True, "1": True, "false": False, "0": False}[text.strip().lower()]
    except KeyError:
        raise ValueError("must be True or False") from None


def _kind(text: str) -> str:
    if text.lower() not in _KINDS:
        raise ValueError(f"is not supported; use one of {', '.join(_KINDS)}")
    return _KINDS[text.lower()]


def _regex(text: Any) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{text!r} is not a regular expression ({error})") from None


def _patterns(text: str) -> tuple[re.Pattern[str], ...]:
    if not isinstance(found := _literal(text), list | tuple):
        raise ValueError("must be a list of regular expressions; try ['.*ffn.*']")
    return tuple(_regex(pattern) for pattern in found)


def _by_pattern(parse: Callable[[str], Any]) -> Callable[[str], tuple[tuple[re.Pattern[str], Any], ...]]:
    def parse_all(text: str) -> tuple[tuple[re.Pattern[str], Any], ...]:
        if not isinstance(found := _literal(text), dict):
            raise ValueError("must be {regular expression: number}; try {'.*ffn.*': 8}")
        return tuple((_regex(pattern), parse(repr(value))) for pattern, value in found.items())

    return parse_all


def _argument(default: Any, parse: Callable[[str], Any], *kinds: str) -> Any:
    """A key of `--network_args`; `kinds`: the networks that know it, all when none is given."""
    return field(default=default, metadata={"parse": parse, "kinds": kinds})


@dataclass(frozen=True)
class NetworkArguments:
    """The keys of `--network_args`. A pattern is matched against whole names, as `blocks.0.self_attn.q` is one."""

    exclude_patterns: tuple[re.Pattern[str], ...] = _argument((), _patterns)  # besides norms, heads and embeddings
    include_patterns: tuple[re.Pattern[str], ...] = _argument((), _patterns)  # rescue what an exclude pattern matches
    module_ranks: tuple[tuple[re.Pattern[str], int], ...] = _argument((), _by_pattern(_rank))  # the first match counts
    module_alphas: tuple[tuple[re.Pattern[str], float], ...] = _argument((), _by_pattern(_alpha))
    rank_dropout: float = _argument(0.0, _fraction)  # share of the rank, per item; LoHa and LoKr: of the outputs
    module_dropout: float = _argument(0.0, _fraction)  # how often a module is left out
    loraplus_lr_ratio: float = _argument(1.0, _ratio, "lora")  # LoRA+ (arXiv 2402.12354)
    conv_dim: int | None = _argument(None, _rank)
    conv_alpha: float | None = _argument(None, _alpha)
    verbose: bool = _argument(False, _switch)  # name every module in the log
    algo: str | None = _argument(None, _kind)
    factor: int = _argument(-1, _factor, "lokr")  # size of the first Kronecker factor; -1: about the square root
    decompose_both: bool = _argument(False, _switch, "lokr")
    full_matrix: bool = _argument(False, _switch, "lokr")
    unbalanced_factorization: bool = _argument(False, _switch, "lokr")


def parse_network_args(pairs: dict[str, str]) -> NetworkArguments:
    """Texts by key -> values. ConfigError for unknown keys and impossible values."""
    known = {key.name: key for key in fields(NetworkArguments)}
    values = {}
    for name, text in pairs.items():
        if name not in known:
            raise ConfigError(f"--network_args {name}: unknown key{suggest(name, known)}; known: {', '.join(known)}")
        try:
            values[name] = known[name].metadata["parse"](text)
        except ValueError as error:
            raise ConfigError(f"--network_args {name}={text}: {error}") from None
    return NetworkArguments(**values)


@dataclass(frozen=True)
class NetworkConfig(Section):
    """LoRA"""

    network_module: str = option(
        "networks.lora_wan",
        help="networks.lora_wan; with the lycoris extra networks.loha, networks.lokr, lycoris.kohya",
    )
    network_dim: int | None = option(
        None,
        minimum=1,
        maximum=_LARGEST_RANK,
        rule=f"must be at least 1 and at most {_LARGEST_RANK}; try 16",
        help="rank; default 4",
    )
    network_alpha: float = option(
        1.0,
        minimum=0,
        below=math.inf,
        rule="must be 0 (same as the rank) or above",
        help="scale = alpha / rank; 0: same as the rank",
    )
    network_dropout: float | None = option(
        None,
        minimum=0,
        below=1,
        rule="must be at least 0 and below 1; try 0.1",
        help="dropout between the two LoRA matrices",
    )
    network_args: tuple[str, ...] = option(
        (), help=f"key=value, with keys {', '.join(key.name for key in fields(NetworkArguments))}"
    )
    network_weights: Path | None = option(None, help="LoRA file to start from, of the same modules and ranks")
    dim_from_weights: bool = option(
        False,
        needs="--network_weights, the file that it takes the ranks from",
        help="take modules, ranks and alphas from --network_weights, whatever --network_dim says",
    )
    scale_weight_norms: float | None = option(
        None,
        above=0,
        below=math.inf,
        rule="must be above 0; try 1",
        help="scale the change of each weight down to this norm after every step",
    )
    base_weights: tuple[Path, ...] = option((), help="LoRA files to merge into the DiT before training")
    base_weights_multiplier: tuple[float, ...] = option((), help="one per --base_weights file; default 1")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.network_module not in _MODULES:
            hint = suggest(self.network_module, _MODULES) or f"; use one of {', '.join(_MODULES)}"
            raise ConfigError(f"--network_module {self.network_module}: not supported{hint}")
        self._check_kind()

    def check(self) -> None:
        """Raise ConfigError unless the files and the package that are asked for are there."""
        if self.network_weights is not None:
            require_lora(self.network_weights, "--network_weights")
        for path in self.base_weights:
            require_lora(path, "--base_weights")
        if self.kind != "lora" and find_spec("lycoris") is None:
            raise ConfigError(
                f"--network_module {self.network_module}: needs the package lycoris-lora; "
                "pip install lycoris-lora, or use networks.lora_wan"
            )

    def _check_kind(self) -> None:
        """Refuse settings that other kinds of networks have and this one lacks."""
        for key in fields(NetworkArguments):
            kinds = key.metadata["kinds"]
            if key.name in self.arguments and kinds and self.kind not in kinds:
                raise ConfigError(f"--network_args {key.name}: is for {' and '.join(kinds)}, not for {self.kind}")
        if self.extra.algo and self.network_module != "lycoris.kohya":
            raise ConfigError("--network_args algo: is for --network_module lycoris.kohya")
        if self.kind == "lora":
            return
        for flag, given in (("--network_dropout", self.network_dropout), ("--dim_from_weights", self.dim_from_weights)):
            if given:
                raise ConfigError(f"{flag}: is for networks.lora_wan, not for {self.kind}; leave it out")

    @property
    def kind(self) -> str:
        """`lora`, `loha` or `lokr`."""
        return _MODULES[self.network_module] or self.extra.algo or "lora"

    @property
    def rank(self) -> int:
        """`network_dim`, 4 when unset."""
        return self.network_dim or 4

    @property
    def alpha(self) -> float:
        """`network_alpha`; 0 stands for the rank."""
        return self.network_alpha or float(self.rank)

    @property
    def arguments(self) -> dict[str, str]:
        """`network_args` by key, each split at its first `=`."""
        pairs = {}
        for argument in self.network_args:
            key, equals, text = argument.partition("=")
            if not equals or not key:
                raise ConfigError(f"--network_args {argument}: must be key=value, e.g. loraplus_lr_ratio=16")
            if key in pairs:
                raise ConfigError(f"--network_args {key}: is given twice; give it once")
            pairs[key] = text
        return pairs

    @cached_property
    def extra(self) -> NetworkArguments:
        """`network_args` with their values."""
        return parse_network_args(self.arguments)

    @property
    def loraplus_lr_ratio(self) -> float:
        """Learning-rate factor of the up weights (LoRA+, arXiv 2402.12354)."""
        return self.extra.loraplus_lr_ratio

    def rank_and_alpha(self, module: str) -> tuple[int, float]:
        """Rank and alpha of a layer by its dotted name: from the first pattern that matches it, else from the flags."""
        rank = next((rank for pattern, rank in self.extra.module_ranks if pattern.fullmatch(module)), self.rank)
        alphas = self.extra.module_alphas
        alpha = next((alpha for pattern, alpha in alphas if pattern.fullmatch(module)), self.network_alpha)
        return rank, alpha or float(rank)
