"""Every stream of random numbers follows from the seed and from what it is for."""

from __future__ import annotations

import hashlib

import torch


def seed_for(*purpose: int | str) -> int:
    """32 bits that depend on ``purpose`` alone."""
    return int.from_bytes(hashlib.blake2b(repr(purpose).encode(), digest_size=4).digest(), "big")


def generator(*purpose: int | str) -> torch.Generator:
    """A CPU generator whose stream depends on ``purpose`` alone."""
    return torch.Generator().manual_seed(seed_for(*purpose))
