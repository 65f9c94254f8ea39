"""Philox4x32-10, a counter-based random generator, and the Gumbel noise that sampling draws from it.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11. A value depends on its key and
counter alone, so the noise of a token does not depend on the batch, on the order of work or on the device.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

UInt64 = NDArray[np.uint64]
Float32 = NDArray[np.float32]

ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)

WORDS = 4  # 32-bit words per counter


def philox4x32(counter: tuple[UInt64, UInt64, UInt64, UInt64], key: tuple[UInt64, UInt64]) -> tuple[UInt64, ...]:
    """Four random 32-bit words for each counter.

    Args:
        counter: four words below 2³² as uint64; arrays of shapes that broadcast.
        key: two words below 2³² as uint64, likewise.

    Returns:
        Four uint64 arrays of the broadcast shape, values below 2³².
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        left = c0 * _MULTIPLIERS[0]
        right = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (right >> _SHIFT) ^ c1 ^ k0, right & _LOW, (left >> _SHIFT) ^ c3 ^ k1, left & _LOW
        k0 = (k0 + _KEY_STEPS[0]) & _LOW
        k1 = (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def uniforms(words: NDArray[np.unsignedinteger]) -> Float32:
    """Map 32-bit words to (k + ½)·2⁻²³ in (0, 1): exact in float32, so the same on every device, and never 0 or 1."""
    return ((words >> words.dtype.type(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)


def gumbel(words: NDArray[np.unsignedinteger]) -> Float32:
    """Standard Gumbel noise −log(−log u) of 32-bit words."""
    noise = uniforms(words)
    np.log(noise, out=noise)
    np.negative(noise, out=noise)
    np.log(noise, out=noise)
    return np.negative(noise, out=noise)


def noise_of_all(seeds: UInt64, positions: NDArray[np.int32], samples: NDArray[np.int32], vocab_size: int) -> Float32:
    """Gumbel noise of every token id for N choices, float32 [N, vocab_size].

    Args:
        seeds: uint64 [N], the key.
        positions: int32 [N], position of the token being chosen.
        samples: int32 [N], which of the request's continuations.
        vocab_size: ids are 0 … vocab_size − 1; id t takes word t mod 4 of the counter (t div 4, position, sample, 0).
    """
    blocks = np.arange(-(-vocab_size // WORDS), dtype=np.uint64)[None, :]
    words = np.empty((len(seeds), blocks.shape[1], WORDS), np.uint32)
    for i, word in enumerate(_words(blocks, seeds[:, None], positions[:, None], samples[:, None])):
        words[:, :, i] = word
    noise = gumbel(words).reshape(len(seeds), -1)
    return noise[:, :vocab_size]


def noise_of(
    token_ids: NDArray[np.integer], seeds: UInt64, positions: NDArray[np.int32], samples: NDArray[np.int32]
) -> Float32:
    """Gumbel noise of single token ids, float32 [N]; equal to ``noise_of_all`` at those ids. All arrays are [N]."""
    ids = token_ids.astype(np.uint64)
    words = np.stack(_words(ids // np.uint64(WORDS), seeds, positions, samples))
    return gumbel(words[ids % np.uint64(WORDS), np.arange(len(ids))].astype(np.uint32))


def _words(
    blocks: UInt64, seeds: UInt64, positions: NDArray[np.int32], samples: NDArray[np.int32]
) -> tuple[UInt64, ...]:
    counter = (blocks, positions.astype(np.uint64), samples.astype(np.uint64), np.zeros((), np.uint64))
    return philox4x32(counter, (seeds & _LOW, seeds >> _SHIFT))
