"""Random numbers with an address in place of a position in a stream."""

import hashlib
import math

import torch
from torch import Tensor


def stratified_uniform(count: int, buckets: int, generator: torch.Generator) -> Tensor:
    """[count] float64 in [0, 1), in random order: equally many from each of `buckets` equal intervals, up to one.

    The draws are ceil(count / buckets) per interval, shuffled together, cut to `count`.
    """
    per_bucket = math.ceil(count / buckets)
    draws = torch.rand(per_bucket, buckets, generator=generator, dtype=torch.float64)
    values = ((torch.arange(buckets) + draws) / buckets).flatten()
    return values[torch.randperm(len(values), generator=generator)[:count]]


def seeded(*address: object) -> torch.Generator:
    """A CPU generator whose numbers depend on nothing but the address, e.g. (seed, epoch, item)."""
    return torch.Generator().manual_seed(address_seed(*address))


def address_seed(*address: object) -> int:
    """A seed, 0 to 2^63 - 1, that depends on the address alone."""
    return int.from_bytes(hashlib.sha256(repr(address).encode()).digest()[:8], "little") >> 1
