"""What a benchmark asks of an engine: how long prompts and outputs are, and random token ids to fill the prompts.

Needs NumPy alone, so that other engines can be given the very same requests (scripts/bench_vllm.py).
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nf.errors import InputError, shown

Int64: TypeAlias = "NDArray[np.int64]"

COLUMNS = ("ContextTokens", "GeneratedTokens")
"""Of a trace, in any order and among others: tokens of a request's prompt and of its output."""


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """Requests in the order they are made.

    Args:
        name: for people, e.g. "1024 in / 512 out" or a trace's file name.
        input_lens, output_lens: tokens of each request, int64 [N], at least 1.
        seed: decides the prompts' token ids.
    """

    name: str
    input_lens: Int64
    output_lens: Int64
    seed: int = 0

    def __len__(self) -> int:
        return len(self.input_lens)

    @property
    def input_tokens(self) -> int:
        return int(self.input_lens.sum())

    @property
    def output_tokens(self) -> int:
        return int(self.output_lens.sum())

    def describe(self) -> dict[str, int | str]:
        """For a record: what tells it from other work."""
        return {
            "name": self.name,
            "requests": len(self),
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "seed": self.seed,
        }

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Token ids of each prompt, uniform over the vocabulary; equal for equal lengths, seed and vocabulary."""
        token_ids = np.random.default_rng([self.seed, 1]).integers(0, vocab_size, self.input_tokens)
        return [prompt.tolist() for prompt in np.split(token_ids, np.cumsum(self.input_lens)[:-1])]

    def warmup(self, count: int, output_len: int) -> Workload:
        """A few requests like the first ones, with other token ids and at most ``output_len`` tokens of output."""
        first = slice(0, count)
        return Workload(
            "warm-up", self.input_lens[first], np.minimum(self.output_lens[first], output_len), self.seed + 1
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """Longest requests that are taken from a trace, in tokens; None takes any."""

    input_len: int | None = None
    output_len: int | None = None
    total_len: int | None = None

    def admit(self, input_lens: Int64, output_lens: Int64) -> NDArray[np.bool_]:
        """Which requests are short enough, bool [N]."""
        most = [2**62 if limit is None else limit for limit in (self.input_len, self.output_len, self.total_len)]
        lens = (input_lens, output_lens, input_lens + output_lens)
        short: NDArray[np.bool_] = np.all([have <= limit for have, limit in zip(lens, most, strict=True)], axis=0)
        return short


def constant(input_len: int, output_len: int, count: int, seed: int = 0) -> Workload:
    """``count`` requests of the same lengths."""
    return Workload(
        f"{input_len} in / {output_len} out",
        np.full(count, input_len, np.int64),
        np.full(count, output_len, np.int64),
        seed,
    )


def from_trace(path: Path, count: int, seed: int = 0, limits: Limits | None = None) -> Workload:
    """``count`` requests drawn from a trace without replacement, among those within the limits.

    Raises:
        InputError: the file cannot be read, a line of it is wrong, or it holds too few such requests.
    """
    input_lens, output_lens = read_trace(path)
    fit = np.flatnonzero((limits or Limits()).admit(input_lens, output_lens))
    if len(fit) < count:
        raise InputError(str(path), f"holds {len(fit):,} requests within the limits, fewer than {count:,}")
    drawn = np.random.default_rng(seed).choice(fit, count, replace=False)
    return Workload(path.name, input_lens[drawn], output_lens[drawn], seed)


def read_trace(path: Path) -> tuple[Int64, Int64]:
    """Input and output lengths of every request of a CSV file, int64 [N] each.

    Raises:
        InputError: the file cannot be read or a line of it is wrong.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _read(path, file)
    except OSError as error:
        raise InputError(str(path), f"cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(str(path), "is not valid UTF-8") from None
    except csv.Error as error:
        raise InputError(str(path), f"is not a CSV file ({error})") from None


def _read(path: Path, file: TextIO) -> tuple[Int64, Int64]:
    reader = csv.reader(file)
    header = next(reader, [])
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        raise InputError(f"{path}, line 1", f"must name the columns {' and '.join(COLUMNS)}; {missing[0]} is missing")
    places = [header.index(name) for name in COLUMNS]
    lens = [
        [_length(path, reader.line_num, row, name, place) for name, place in zip(COLUMNS, places, strict=True)]
        for row in reader
        if row
    ]
    if not lens:
        raise InputError(str(path), "holds no requests, only the line with the columns' names")
    input_lens, output_lens = np.array(lens, np.int64).T
    return input_lens, output_lens


def _length(path: Path, line: int, row: list[str], name: str, place: int) -> int:
    where = f"{path}, line {line}"
    if place >= len(row):
        raise InputError(where, f"has {len(row)} fields, too few for {name}")
    text = row[place].strip()
    if not (text.isascii() and text.isdecimal() and len(text) < _MOST_DIGITS and int(text) >= 1):
        raise InputError(where, f"{name} must be a number of tokens, at least 1, not {shown(row[place])}")
    return int(text)


_MOST_DIGITS = 10  # more tokens than any request has, and the sums still fit
