"""How the time of the layer's GEMMs goes with the number of rows: in steps, of whole rounds of tiles.

A profile has a few batch sizes; between them time is no straight line. What a product costs in the configuration that
is chosen for so many rows and SMs (``kernels.gemm.cost``) is right up to a factor that changes slowly.
"""

from __future__ import annotations

from collections.abc import Iterable

from nf.kernels.gemm import Epilogue, choose, cost
from nf.models.declaration import Model
from nf.models.operations import Operation, Resource, Rows
from nf.planning.profile import ROW_STEP, Sms, SoloKey, Trend
from nf.planning.profiling import is_light


def gemm_trend(model: Model, points: Iterable[SoloKey], gpu_sms: int) -> Trend:
    """The trend of every dense product among ``points``, on every number of SMs, up to its largest number of rows.

    Experts have none: how many rows each of them gets is not known beforehand.
    """
    shapes = {weight.name: weight.shape for weight in model.layer_weights}
    products = {o.name: shapes[o.weights[0]] for o in model.operations if _is_product(o, shapes)}
    most: dict[tuple[str, Sms], int] = {}
    for name, rows, sms, _ in points:
        if name in products:
            most[name, sms] = max(rows, most.get((name, sms), 0))
    found: Trend = {}
    for (name, sms), rows in most.items():
        n, k = products[name]
        epilogue: Epilogue = "swiglu" if name == "gate_up_proj" else "none"  # others are served alike
        on = gpu_sms if sms == "all" else sms
        steps = range(ROW_STEP, rows + ROW_STEP, ROW_STEP)
        costs = [cost(choose(n, k, step, on, epilogue).config, n, k, step, on) for step in steps]
        found[name, sms] = tuple(value / costs[0] for value in costs)
    return found


def _is_product(operation: Operation, shapes: dict[str, tuple[int, ...]]) -> bool:
    return (
        operation.resource is Resource.COMPUTE
        and operation.rows is Rows.ALL
        and not is_light(operation)
        and len(shapes[operation.weights[0]]) == 2
    )
