"""Stage I of the search: number, sizes and order of the nano-operations, with what each takes alone.

NanoFlow (arXiv 2408.12757, section 4.2.1) chooses all of it in one integer program over three layers. Here the choice
is taken apart: the outer search goes over how the operations are cut, and for each cutting the best order *at steady
state* is an integer program of its own (order.py), solved to the end in a second or so. As in the paper, nano-batches
are made of chunks of 128 tokens, nano-operations of one lane never overlap, dependencies follow from buffers and token
ranges, the search begins with two nano-batches and cuts further, or joins again, where the best pipeline so far has
bubbles. What a smaller nano-batch costs, weights read again and half-filled waves, is in the durations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import monotonic

from nf.errors import InputError
from nf.graphs.builtin import lane_of
from nf.models.operations import Operation
from nf.planning.nano_layer import CHUNK, BatchShape, CostOf, Cuts, NanoLayer, nano_layer
from nf.planning.order import best_order, least_period
from nf.planning.rounds import Rounds

SECONDS_PER_ORDER = 3.0  # at most, for one cutting
MAX_RANGES = 8  # nano-operations of one operation
FIRST_CUTS = 16  # places at which a cut through all operations is tried
WORTH = 1e-3  # relative; a smaller gain does not pay for another nano-operation
KEEP_WITHIN = 1.15  # times the best period; what is slower alone may still be faster when operations interfere


@dataclass(frozen=True)
class Structure:
    """A layer cut and ordered.

    Args:
        rounds: tasks and their order.
        period: seconds per layer at steady state if nothing interferes.
        bound: seconds; no order of the same nano-operations has a shorter period.
    """

    rounds: Rounds
    period: float
    bound: float

    @property
    def cuts(self) -> dict[str, tuple[int, ...]]:
        """Where each operation is cut."""
        cuts: dict[str, tuple[int, ...]] = {}
        for task in self.rounds.layer.tasks:
            cuts[task.operation.name] = cuts.get(task.operation.name, ()) + ((task.start,) if task.start else ())
        return cuts


@dataclass(frozen=True)
class StructureSearch:
    """What Stage I found.

    Args:
        structures: shortest period first, each cut in another way; the sequential one is among them.
        bound: seconds; no structure at all has a shorter period.
        tried: cuttings whose best order was looked for.
        seconds: spent.
    """

    structures: tuple[Structure, ...]
    bound: float
    tried: int
    seconds: float

    @property
    def best(self) -> Structure:
        return self.structures[0]

    @property
    def gap(self) -> float:
        """How much shorter than the best one a period could at most be, relative."""
        return 1 - self.bound / self.best.period


def search_structures(
    operations: Sequence[Operation],
    batch: BatchShape,
    cost_of: CostOf,
    *,
    seconds: float = 60.0,
    keep: int = 12,
    lane: Callable[[Operation], str] = lane_of,
) -> StructureSearch:
    """Look for the structures with the shortest periods.

    Args:
        operations: of one layer, in logical order.
        cost_of: their time and energy alone.
        seconds: to search for, roughly; what was found until then is returned.
        keep: structures to return at most.
        lane: what an operation queues for.

    Raises:
        InputError: there is nothing to search, or ``cost_of`` does not know an operation.
    """
    if batch.tokens < 1 or not 0 <= batch.decode_tokens <= batch.tokens:
        raise InputError("batch", f"decode tokens must be 0 to the {batch.tokens} of the dense batch, at least 1")
    return _Search(operations, batch, cost_of, monotonic() + seconds, lane).run(keep)


class _Search:
    def __init__(
        self,
        operations: Sequence[Operation],
        batch: BatchShape,
        cost_of: CostOf,
        deadline: float,
        lane: Callable[[Operation], str],
    ) -> None:
        self.operations, self.batch, self.cost_of, self.lane = tuple(operations), batch, cost_of, lane
        self.began, self.deadline = monotonic(), deadline
        self.names = [operation.name for operation in operations]
        self.found: dict[tuple[tuple[int, ...], ...], Structure | None] = {}  # per way to cut

    def run(self, keep: int) -> StructureSearch:
        sequential = self.sequential()
        places = _first_places(self.batch.tokens)
        for place in places:
            self.try_cuts(dict.fromkeys(self.names, (place,)), self.best.period * KEEP_WITHIN)
        while monotonic() < self.deadline and self.improve():
            pass
        known = [structure for structure in self.found.values() if structure]
        best = sorted(known, key=lambda s: (round(s.period / self.best.period, 4), len(s.rounds.layer.tasks)))[:keep]
        structures = tuple(best) if sequential in best else (*best[: keep - 1], sequential)
        bound = min(best[0].period, structure_bound(self.operations, self.batch, self.cost_of, self.lane))
        return StructureSearch(structures, bound, len(self.found), monotonic() - self.began)

    def sequential(self) -> Structure:
        """Nothing cut; in logical order if there is no time to find a better one."""
        self.try_cuts({}, math.inf)
        if (found := self.found.get(self.key({}))) is None:
            layer = self.layer({})
            rounds = Rounds(layer, layer.lanes, (0,) * len(layer.tasks))
            found = self.found[self.key({})] = Structure(rounds, rounds.period(), least_period(layer))
        return found

    @property
    def best(self) -> Structure:
        return min((s for s in self.found.values() if s), key=lambda s: s.period)

    def improve(self) -> bool:
        """Try the neighbours of the best structure, those at its bubbles first, until one is better."""
        base = self.best
        critical = {base.rounds.layer.tasks[i].operation.name for i in base.rounds.critical()}
        goal = base.period * (1 - WORTH)
        neighbours: list[tuple[bool, float, dict[str, tuple[int, ...]], NanoLayer]] = []
        for window, cuts in self.neighbours(base.cuts):
            if monotonic() > self.deadline:
                return False
            if self.key(cuts) in self.found:
                continue
            layer = self.layer(cuts)
            least = least_period(layer)
            if least < goal:
                neighbours.append((critical.isdisjoint(window), least, cuts, layer))
        for _, _, cuts, layer in sorted(neighbours, key=lambda n: n[:2]):
            if self.try_cuts(cuts, goal, layer):
                return True
            if monotonic() > self.deadline:
                break
        return False

    def neighbours(self, cuts: dict[str, tuple[int, ...]]) -> Iterator[tuple[list[str], dict[str, tuple[int, ...]]]]:
        """For every stretch of successive operations: joined, cut once more, or with a cut moved by a chunk or two."""
        for first in range(len(self.names)):
            for last in range(first, len(self.names)):
                window = self.names[first : last + 1]
                for change in _changes(
                    sorted({cuts[name] for name in window}, key=lambda cut: (len(cut), cut)), self.batch.tokens
                ):
                    changed = cuts | {name: change[cuts[name]] for name in window if cuts[name] in change}
                    yield window, changed

    def try_cuts(self, cuts: Cuts, shorter_than: float, layer: NanoLayer | None = None) -> bool:
        """Whether there is an order with the wanted period; what was found is kept."""
        key = self.key(cuts)
        seconds = min(SECONDS_PER_ORDER, self.deadline - monotonic())
        if key in self.found or seconds <= 0:
            return False
        layer = layer or self.layer(cuts)
        ordering = best_order(layer, seconds, shorter_than=shorter_than)
        if ordering.rounds is None:
            self.found[key] = None
            return False
        self.found[key] = Structure(ordering.rounds, ordering.rounds.period(), ordering.bound)
        return True

    def layer(self, cuts: Cuts) -> NanoLayer:
        return nano_layer(self.operations, self.batch, cuts, self.cost_of, self.lane)

    def key(self, cuts: Cuts) -> tuple[tuple[int, ...], ...]:
        return tuple(cuts.get(name, ()) for name in self.names)


Change = dict[tuple[int, ...], tuple[int, ...]]
"""Old cuts → new cuts; operations with other cuts stay as they are."""


def _first_places(tokens: int) -> list[int]:
    """Where a single cut through all operations is tried, the middle first."""
    chunks = math.ceil(tokens / CHUNK)
    step = max(1, round(chunks / FIRST_CUTS))
    return sorted((c * CHUNK for c in range(step, chunks, step)), key=lambda place: abs(place - tokens / 2))


def _changes(present: Sequence[tuple[int, ...]], tokens: int) -> Iterator[Change]:
    """Ways to change operations that are cut in the ways ``present``."""
    yield dict.fromkeys(present, ())
    for old in present:
        for start, stop in pairwise((0, *old, tokens)):
            middle = round((start + stop) / 2 / CHUNK) * CHUNK
            if start < middle < stop and len(old) + 2 <= MAX_RANGES:
                yield dict.fromkeys(present, tuple(sorted({*old, middle})))
        for cut in old:
            for shift in (-CHUNK, CHUNK, -2 * CHUNK, 2 * CHUNK):
                moved = {*old} - {cut} | {cut + shift}
                if 0 < cut + shift < tokens and len(moved) == len(old):
                    yield {old: tuple(sorted(moved))}


def structure_bound(
    operations: Sequence[Operation],
    batch: BatchShape,
    cost_of: CostOf,
    lane: Callable[[Operation], str] = lane_of,
) -> float:
    """Seconds that the busiest lane needs for a layer even if every operation were cut as suits it best."""
    edges = (*range(0, batch.tokens, CHUNK), batch.tokens)
    loads: dict[str, float] = {}
    for operation in operations:
        # least[i]: the best way to cut tokens [0, edges[i]).
        least = [0.0]
        for i in range(1, len(edges)):
            costs = (
                least[j] + cost_of(operation, batch.rows(operation, edges[j], edges[i]), "all").seconds
                for j in range(i)
            )
            least.append(min(costs))
        loads[lane(operation)] = loads.get(lane(operation), 0.0) + least[-1]
    return max(loads.values())
