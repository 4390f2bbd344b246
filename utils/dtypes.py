"""dtype names as the command line and the cache files spell them."""

import torch

from utils.errors import ConfigError, suggest

_ALIASES = {
    torch.bfloat16: ("bfloat16", "bf16"),
    torch.float16: ("float16", "fp16"),
    torch.float32: ("float32", "fp32", "float"),
    torch.float8_e4m3fn: ("float8_e4m3fn", "fp8_e4m3fn", "e4m3fn", "fp8", "float8"),
    torch.float8_e4m3fnuz: ("float8_e4m3fnuz", "fp8_e4m3fnuz", "e4m3fnuz"),
    torch.float8_e5m2: ("float8_e5m2", "fp8_e5m2", "e5m2"),
    torch.float8_e5m2fnuz: ("float8_e5m2fnuz", "fp8_e5m2fnuz", "e5m2fnuz"),
}
_BY_NAME = {name: dtype for dtype, names in _ALIASES.items() for name in names}


def parse_dtype(name: str) -> torch.dtype:
    """`bf16`, `bfloat16`, `fp32` ... -> torch.dtype (docs/formats.md#dtype-names); ConfigError for other names."""
    if name not in _BY_NAME:
        raise ConfigError(f"'{name}' is not a dtype{suggest(name, _BY_NAME) or '; use bfloat16, float16 or float32'}")
    return _BY_NAME[name]


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> `bfloat16`, the suffix in cache keys (docs/formats.md#latent-caches)."""
    return str(dtype).removeprefix("torch.")
