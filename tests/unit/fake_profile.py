"""A GPU by formula, for tests of profiling and searching: fast, and without noise unless some is asked for."""

from __future__ import annotations

from nf.models.operations import Rows
from nf.models.registry import declare
from nf.models.shapes import shape
from nf.planning.profile import CoRun, Cost, Profile, ProfileKey, Side, SoloKey
from nf.planning.profiling import ENDS, fill, quick_extent

SMS = 132
KEY = ProfileKey("NVIDIA H200", "580", "test")
MODEL = declare(shape("llama-3-8b"))
WEIGHTS = {weight.name: weight.shape for weight in MODEL.layer_weights}
OPERATIONS = {operation.name: operation for operation in MODEL.operations}


class FormulaBench:
    """GEMMs at 5 TFLOP/s per SM, attention at 100 GB/s per SM up to 4.6 TB/s, everything else 10 µs.

    Args:
        kept: R of a GEMM beside decode attention, speed of that P, over their performance on their SMs.
        fails_after: points, after which the bench breaks down.
    """

    idle_watts, cap_watts = 120.0, 700.0
    broken = False

    def __init__(self, kept: float = 0.97, speed: float = 0.9, fails_after: int | None = None) -> None:
        self.kept, self.speed, self.fails_after = kept, speed, fails_after
        self.measured: list[SoloKey | tuple[SoloKey, SoloKey]] = []

    def solo(self, key: SoloKey) -> Cost:
        self._count(key)
        seconds = self.seconds(key)
        return Cost(seconds, 650.0 * seconds)

    def co_run(self, first: SoloKey, second: SoloKey) -> CoRun:
        self._count((first, second))
        slow = 0.7 if second[2] == "all" else 1.0  # the hardware divides the SMs
        sides = Side(*first, self.seconds(first) / self.kept / slow), Side(*second, self.seconds(second) / self.speed)
        return CoRun(*sides, 690.0)

    def seconds(self, key: SoloKey) -> float:
        name, rows, sms, context = key
        count = SMS if sms == "all" else sms
        if name == ENDS:
            return 1e-6 * rows
        operation = OPERATIONS[name]
        if operation.rows is Rows.DECODE:
            return rows * context * 4096 / min(4.6e12, 140e9 * count)
        if operation.rows is Rows.PREFILL:
            return rows * context * 16384 / (3e12 * count)
        matrices = [WEIGHTS[weight] for weight in operation.weights if len(WEIGHTS[weight]) > 1]
        if not matrices:
            return 1e-5
        n, k = matrices[0]
        return 2 * rows * n * k / (5e12 * count)

    def _count(self, point: SoloKey | tuple[SoloKey, SoloKey]) -> None:
        if self.fails_after is not None and len(self.measured) >= self.fails_after:
            raise RuntimeError("the GPU is gone")
        self.measured.append(point)


def formula_profile(dense_batch_size: int = 2048, bench: FormulaBench | None = None) -> Profile:
    """A full set of quick measurements of the formulas."""
    from nf.graphs.plan_store import shape_name

    profile = Profile(KEY, shape_name(MODEL.config), SMS, 120.0, 700.0)
    extent = quick_extent(dense_batch_size, SMS)
    fill(profile, bench or FormulaBench(), MODEL.operations, extent, save=lambda _: None)
    return profile
