"""Every stream of random numbers follows from the seed and from what it is for."""

from __future__ import annotations

import hashlib

import torch


def generator(*purpose: int | str) -> torch.Generator:
    """A CPU generator whose stream depends on ``purpose`` alone."""
    digest = hashlib.blake2b(repr(purpose).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
