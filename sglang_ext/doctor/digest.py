"""Digests of tensor rows: equal bits give equal digests, whatever the device and number of threads."""

from __future__ import annotations

import functools
import hashlib

import torch

# SplitMix64's increment and first multiplier (Steele, Lea, Flood 2014), as signed 64-bit constants.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIER = 0xBF58476D1CE4E5B9 - 2**64

#: 8-byte words that are digested at once: bounds the temporary memory.
_WORDS_AT_ONCE = 1 << 22


def row_digests(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """One 64-bit digest per row of ``tensor``.

    Integer arithmetic only, so the digest of a row depends on its bits and nothing else. A row that differs
    in one 8-byte word always has another digest; otherwise two rows share one by chance, once in 2^64.

    Args:
        tensor: any dtype, its first dimension a multiple of ``rows``.

    Returns:
        int64 ``[rows]`` on the device of ``tensor``.

    Raises:
        ValueError: the first dimension is no multiple of ``rows``.
    """
    if tensor.dim() == 0 or rows < 1 or tensor.shape[0] % rows:
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} does not have {rows} rows")
    words = _words(tensor, rows)
    digests = torch.empty(rows, dtype=torch.int64, device=tensor.device)
    step = max(1, _WORDS_AT_ONCE // max(1, words.shape[1]))
    for first in range(0, rows, step):
        chunk = slice(first, first + step)
        digests[chunk] = _mix(words[chunk] * _multipliers(words.shape[1], tensor.device)).sum(1)
    return digests


def combine(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Digest of two digests, in this order."""
    return _mix(first * _MULTIPLIER + second) * _GAMMA


def hex_digest(digests: torch.Tensor) -> str:
    """SHA-256 of row digests in their order, as 64 hexadecimal digits."""
    return hashlib.sha256(digests.cpu().numpy().tobytes()).hexdigest()


def _words(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """The bytes of each row as int64 ``[rows, words]``, the last word filled up with zeros."""
    flat = tensor.detach().reshape(rows, -1).contiguous().view(torch.uint8)
    if missing := -flat.shape[1] % 8:
        flat = torch.nn.functional.pad(flat, (0, missing))
    return flat.view(torch.int64)


@functools.lru_cache(maxsize=32)
def _multipliers(words: int, device: torch.device) -> torch.Tensor:
    """Odd numbers, one per word: an odd factor loses no bit of a word."""
    counter = torch.arange(1, words + 1, dtype=torch.int64, device=device)
    return _mix(counter * _GAMMA) * _MULTIPLIER | 1


def _mix(value: torch.Tensor) -> torch.Tensor:
    """High bits into low ones; the mask makes the shift logical, so that no bit is lost."""
    return value ^ ((value >> 32) & (2**32 - 1))
