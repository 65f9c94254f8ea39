"""Philox against Random123's known answers and a plain implementation; the noise made of it."""

from __future__ import annotations

import numpy as np
import pytest

from nf.executors.philox import gumbel, noise_of, noise_of_all, philox4x32, uniforms

# kat_vectors of Random123, "philox4x32 10": counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> tuple[np.ndarray, ...]:
    return tuple(np.array([int(word, 16)], np.uint64) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter: str, key: str, result: str) -> None:
    found = philox4x32(words(counter), words(key))  # type: ignore[arg-type]
    assert [int(word[0]) for word in found] == [int(word, 16) for word in result.split()]


def plain(counter: list[int], key: list[int]) -> list[int]:
    for _ in range(10):
        left, right = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [right >> 32 ^ counter[1] ^ key[0], right % 2**32, left >> 32 ^ counter[3] ^ key[1], left % 2**32]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


def test_noise_of_a_token_is_a_function_of_seed_position_sample_and_id() -> None:
    rng = np.random.default_rng(0)
    seeds = rng.integers(0, 2**64, 5, dtype=np.uint64)
    positions = rng.integers(0, 2**31 - 1, 5).astype(np.int32)
    samples = np.arange(5, dtype=np.int32)
    noise = noise_of_all(seeds, positions, samples, 103)
    assert noise.shape == (5, 103)
    for i in range(5):
        seed = int(seeds[i])
        for token in range(103):
            word = plain([token // 4, int(positions[i]), i, 0], [seed % 2**32, seed >> 32])[token % 4]
            uniform = ((word >> 9) + 0.5) / 2**23
            assert noise[i, token] == pytest.approx(-np.log(-np.log(uniform)), rel=1e-5, abs=1e-5)


def test_noise_of_single_ids_has_the_same_bits() -> None:
    rng = np.random.default_rng(1)
    seeds = rng.integers(0, 2**64, 3, dtype=np.uint64)
    positions, samples = np.array([0, 7, 40_000], np.int32), np.array([0, 3, 127], np.int32)
    everything = noise_of_all(seeds, positions, samples, 1001)
    row, ids = rng.integers(0, 3, 200), rng.integers(0, 1001, 200)
    few = noise_of(ids, seeds[row], positions[row], samples[row])
    np.testing.assert_array_equal(few, everything[row, ids])


def test_extreme_words_give_finite_noise() -> None:
    extremes = np.array([0, 1, 2**31, 2**32 - 1], np.uint32)
    assert uniforms(extremes).min() == np.float32(2.0**-24)
    assert uniforms(extremes).max() == np.float32(1 - 2.0**-24)
    assert np.isfinite(gumbel(extremes)).all()


def test_uniforms_are_uniform_over_ids_positions_samples_and_seeds() -> None:
    """Each axis alone drives the generator; chi-square over 64 bins, 5 standard deviations allowed."""
    count = 1 << 14
    axis = np.arange(count)
    zero = np.zeros(count, np.int32)
    draws = {
        "ids": noise_of(axis, np.full(count, 9, np.uint64), zero, zero),
        "positions": noise_of(zero, np.full(count, 9, np.uint64), axis.astype(np.int32), zero),
        "samples": noise_of(zero, np.full(count, 9, np.uint64), zero, axis.astype(np.int32)),
        "seeds": noise_of(zero, axis.astype(np.uint64), zero, zero),
        "high seeds": noise_of(zero, axis.astype(np.uint64) << np.uint64(32), zero, zero),
    }
    for name, noise in draws.items():
        uniform = np.exp(-np.exp(-noise.astype(np.float64)))
        found = np.histogram(uniform, 64, (0, 1))[0]
        statistic = ((found - count / 64) ** 2 / (count / 64)).sum()
        assert abs(statistic - 63) < 5 * np.sqrt(2 * 63), name
