"""The ceilings of this machine's GPU for one model, measured right after a run so that clocks and power are alike."""

from __future__ import annotations

from nf.bench.roofline import Ceilings
from nf.config import ModelConfig

READ_BYTES = 2 << 30
WARM_SECONDS, RUN_SECONDS = 1.0, 2.0  # the energy counter moves ten times a second


def measure_ceilings(config: ModelConfig, rows: int, gpus: int = 1) -> Ceilings:
    """Matrix products of the model's layers on ``rows`` rows, and a streaming read, each at steady state.

    The products run in one layer's order and on weights of their own, by this project's kernels and by cuBLAS; the
    faster counts. Experts count as one dense feed-forward network.

    Args:
        rows: size of the dense batch.
        gpus: that share the model; each is taken to be like the first.

    Raises:
        NfError: cupy is not installed.
    """
    from nf.bench.measure import Call, measure, need_cupy

    need_cupy()
    from nf.bench.card import power_cap
    from nf.bench.gemm_cases import Products
    from nf.bench.kernels import Bench
    from nf.kernels import gemm, stream

    bench = Bench([*gemm.sources(), stream.READ])
    products = Products(bench, layer_shapes(config))
    calls = (products.ours(rows, bench.sms), products.cublas(rows))
    runs = [measure([call], warm=WARM_SECONDS, run=RUN_SECONDS) for call in calls]
    best = min(runs, key=lambda run: run.seconds)
    memory = bench.normal(READ_BYTES // 2)
    ring = stream.StreamRead(bench.loader)
    reads: list[Call] = [lambda on: ring.launch(memory.data.ptr, READ_BYTES, sms=bench.sms, stream=on)]
    read = measure(reads, warm=WARM_SECONDS, run=RUN_SECONDS)
    flop = rows * products.bytes  # two operations per weight of two bytes
    return Ceilings(
        flops=gpus * flop / best.seconds,
        joules_per_flop=best.joules / flop,
        read_rate=gpus * READ_BYTES / read.seconds,
        joules_per_byte=read.joules / READ_BYTES,
        watts=gpus * power_cap(),
    )


def layer_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """(n, k) of the products of one layer: qkv, o, gate and up, down."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = config.num_heads * config.head_dim
    return [(config.qkv_size, hidden), (hidden, heads), (2 * inner, hidden), (hidden, inner)]
