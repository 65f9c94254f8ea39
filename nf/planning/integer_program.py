"""Mixed-integer linear programs, solved by HiGHS (Huangfu and Hall, 2018; the extra ``plan``)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nf.errors import InputError


def solver() -> Any:
    """The module of HiGHS.

    Raises:
        InputError: it is not installed.
    """
    try:
        import highspy
    except ImportError:
        raise InputError(
            "nf plan", "the search needs the solver HiGHS; install it with: pip install 'nf[plan]'"
        ) from None
    return highspy


@dataclass(frozen=True, slots=True)
class Solution:
    """What the solver found.

    Args:
        values: of the variables; None if no solution is known (there is none, or time ran out before one was found).
        objective: of ``values``.
        bound: no solution has a larger objective; −inf if there is none at all.
    """

    values: tuple[float, ...] | None
    objective: float
    bound: float


@dataclass(slots=True)
class IntegerProgram:
    """Maximize gain · x subject to lower ≤ x ≤ upper and rows a · x ≥ b, some of the x integers."""

    gains: list[float] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    integers: list[bool] = field(default_factory=list)
    rows: list[dict[int, float]] = field(default_factory=list)
    least: list[float] = field(default_factory=list)
    most: list[float] = field(default_factory=list)

    def variable(self, lower: float, upper: float, *, gain: float = 0.0, integer: bool = False) -> int:
        """A new variable; returns its index."""
        for values, value in ((self.gains, gain), (self.lower, lower), (self.upper, upper)):
            values.append(value)
        self.integers.append(integer)
        return len(self.gains) - 1

    def at_least(self, terms: Mapping[int, float], least: float) -> None:
        """Σ terms[x] · x ≥ least."""
        self._row(terms, least, math.inf)

    def equal(self, terms: Mapping[int, float], value: float) -> None:
        """Σ terms[x] · x = value."""
        self._row(terms, value, value)

    def _row(self, terms: Mapping[int, float], least: float, most: float) -> None:
        self.rows.append(dict(terms))
        self.least.append(least)
        self.most.append(most)

    def holds(self, values: Sequence[float], tolerance: float = 1e-6) -> bool:
        """Whether ``values`` of all variables satisfy every row."""
        return all(
            least - tolerance <= sum(factor * values[x] for x, factor in row.items()) <= most + tolerance
            for row, least, most in zip(self.rows, self.least, self.most, strict=True)
        )

    def solve(self, seconds: float, start: Sequence[float] | None = None) -> Solution:
        """Search for at most ``seconds``, on one core; ``start`` is a solution to begin with.

        Raises:
            InputError: HiGHS is not installed.
        """
        highspy = solver()
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = len(self.gains), len(self.rows)
        lp.sense_ = highspy.ObjSense.kMaximize
        lp.col_cost_ = np.array(self.gains)
        lp.col_lower_, lp.col_upper_ = np.array(self.lower), np.array(self.upper)
        lp.row_lower_, lp.row_upper_ = np.array(self.least), np.array(self.most)
        kinds = highspy.HighsVarType
        lp.integrality_ = [kinds.kInteger if integer else kinds.kContinuous for integer in self.integers]
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_ = np.cumsum([0, *(len(row) for row in self.rows)])
        lp.a_matrix_.index_ = np.array([index for row in self.rows for index in row])
        lp.a_matrix_.value_ = np.array([value for row in self.rows for value in row.values()])

        with _silent_stdout():
            highs = highspy.Highs()
        for option, value in {"output_flag": False, "threads": 1, "time_limit": max(0.01, seconds)}.items():
            highs.setOptionValue(option, value)
        highs.passModel(lp)
        if start is not None:
            guess = highspy.HighsSolution()
            guess.col_value = list(start)
            highs.setSolution(guess)
        highs.run()
        info = highs.getInfo()
        if highs.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
            return Solution(None, -math.inf, -math.inf)
        objective = float(info.objective_function_value)
        bound = float(info.mip_dual_bound) if any(self.integers) else objective
        if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            return Solution(None, -math.inf, bound)
        return Solution(tuple(highs.getSolution().col_value), objective, bound)


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """Some releases of HiGHS greet on standard output, whatever their options say, and results go there."""
    try:
        kept = os.dup(1)
    except OSError:  # it is closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
