"""The cost model against the paper's printed tables, against counts by hand, and against measured joules."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from nf.errors import InputError
from nf.models.declaration import Model
from nf.models.operations import Resource
from nf.models.registry import declare
from nf.models.shapes import shape
from nf.planning.cost_model import (
    Estimate,
    Machine,
    compute_time,
    dynamic_joules,
    estimate,
    memory_time,
    optimal_throughput,
)
from nf.planning.figures import WORKLOADS, memory_figure, network_figure
from nf.planning.hardware import ACCELERATORS, Accelerator
from nf.planning.operation_costs import (
    VALUE_BYTES,
    Counting,
    OperationCost,
    Workload,
    kv_bytes_per_token,
    operation_costs,
    parameters,
)

A100, H200 = ACCELERATORS["a100-80gb"], ACCELERATORS["h200"]

TABLE_2 = {  # Llama-2-70B on 8 × A100, B = 2048: GFLOP, memory GB, network GB, compute ms, memory ms, network ms
    "qkv_proj": (27487.8, 19.5, 0, 11.01, 1.22, 0),
    "o_proj": (21990.2, 16.1, 0, 8.81, 1.01, 0),
    "gate_up_proj": (153931.6, 96.6, 0, 61.67, 6.04, 0),
    "down_proj": (76965.8, 49.7, 0, 30.84, 3.11, 0),
    "decode_attention": (3665.9, 462.2, 0, 1.47, 28.89, 0),
    "prefill_attention": (916.3, 2.1, 0, 0.37, 0.13, 0),
    "all_reduce": (18.8, 75.2, 75.2, 0.01, 4.70, 31.33),
}
TABLE_2_TOTAL_MS = (114.17, 45.09, 31.33)


def model(name: str) -> Model:
    return declare(shape(name))


def agrees(value: float | None, printed: float, digits: int) -> bool:
    """Within 5 %, or the same once rounded as printed."""
    return value is not None and (value == pytest.approx(printed, rel=0.05) or round(value, digits) == printed)


def table_2() -> Estimate:
    return estimate(
        model("llama-2-70b"), Machine(A100, 8), Workload(512, 1024), dense_batch=2048, counting=Counting.PAPER
    )


def test_table_2_operation_by_operation() -> None:
    found = table_2()
    assert [cost.name for cost in found.operations] == [
        "qkv_proj",
        "decode_attention",
        "prefill_attention",
        "o_proj",
        "gate_up_proj",
        "down_proj",
        "all_reduce",
    ]
    for cost in found.operations:
        times = [1e3 * seconds for seconds in found.machine.rates.times(cost)]
        values = (cost.flops / 1e9, cost.memory_bytes / 1e9, cost.network_bytes / 1e9, *times)
        for value, printed in zip(values, TABLE_2[cost.name], strict=True):
            assert agrees(value, printed, 2), (cost.name, value, printed)


def test_table_2_totals() -> None:
    found = table_2()
    assert found.machine.rates.times(found.total) == pytest.approx([ms / 1e3 for ms in TABLE_2_TOTAL_MS], rel=0.01)
    assert found.bound is Resource.COMPUTE


def test_figure_2() -> None:
    figure = network_figure()
    assert (len(figure.rows), len(figure.columns)) == (6, 13)
    for values, printed in zip(figure.values, figure.printed, strict=True):
        assert values == pytest.approx(printed, rel=0.05)


def test_figure_3_but_for_mixtral() -> None:
    figure = memory_figure(A100)
    for name, values, printed in zip(figure.rows, figure.values, figure.printed, strict=True):
        if not name.startswith("mixtral"):
            assert all(agrees(value, cell, 2) for value, cell in zip(values, printed, strict=True)), name


def test_figure_3_of_mixtral_is_printed_as_if_idle_experts_took_no_memory() -> None:
    """The whole row differs, by what the weights of the six experts that a token does not meet take of the memory."""
    mixtral, machine, row = model("mixtral-8x7b"), Machine(A100, 8), 1
    figure = memory_figure(A100)
    active = parameters(mixtral, active=True)
    for workload, value, printed in zip(WORKLOADS.values(), figure.values[row], figure.printed[row], strict=True):
        assert not agrees(value, printed, 2)
        resident = kv_bytes_per_token(mixtral.config) * (workload.input_len + workload.output_len / 2)
        requests = (machine.memory - VALUE_BYTES * active) / resident
        as_printed = memory_time(machine) / compute_time(machine, active, requests / workload.decode_share)
        assert as_printed == pytest.approx(printed, rel=0.06)


def test_another_model_is_a_row_of_both_figures_once() -> None:
    other = model("qwen2-7b")
    assert network_figure(("mine", other)).rows[-1] == "mine"
    assert memory_figure(H200, ("mine", other, 1)).rows[-1] == "mine, 1 GPU"
    assert len(network_figure(("mine", model("llama-3-8b"))).rows) == 6
    assert len(memory_figure(H200, ("mine", model("llama-3-8b"), 1)).rows) == 5
    assert memory_figure(H200, ("mine", model("llama-3-8b"), 2)).rows[-1] == "mine, 2 GPUs"
    assert memory_figure(H200).printed[0] == (None,) * 6  # the paper prints A100s
    assert memory_figure(ACCELERATORS["v100"]).values[0] == (None,) * 6  # the weights alone fill a V100


def test_equation_5_as_the_paper_and_the_record_state_it() -> None:
    """1857 tokens/s per A100 (260 TFLOP/s; the text says 280), 12,756 of Llama-3-8B are 78.5 %; 41.7 k on an H200."""
    assert optimal_throughput(260e12, 70e9) == pytest.approx(1857, abs=0.5)
    assert 12756 / optimal_throughput(260e12, parameters(model("llama-3-8b"))) == pytest.approx(0.785, rel=0.01)
    mixtral = parameters(model("mixtral-8x7b"), active=True)
    assert 5188 / optimal_throughput(260e12, mixtral) == pytest.approx(0.504, rel=0.05)
    assert optimal_throughput(670e12, parameters(model("llama-3-8b"))) == pytest.approx(41.7e3, rel=0.01)


def test_the_power_roofline_of_the_measured_card() -> None:
    """33 to 34 k tokens/s of Llama-3-8B at 1024 in, 512 out on an H200, and 28.4 k one operation after the other."""
    found = estimate(model("llama-3-8b"), Machine(H200), Workload(1024, 512), dense_batch=2048)
    power_time = found.power_time()
    assert power_time is not None
    assert 32.5e3 < found.throughput(power_time) < 34.5e3
    assert found.throughput(found.sequential_time(found.machine.measured_rates)) == pytest.approx(28.4e3, rel=0.05)


def test_power_draws_the_static_share_once() -> None:
    """One operation alone draws what it was measured to draw, idle power included, on however many GPUs."""
    power = H200.measured.power
    assert power is not None
    for gpus in (1, 8):
        machine = Machine(H200, gpus)
        rates, idle = machine.measured_rates, gpus * power.static_watts  # one second of work
        gemm, read = OperationCost("gemm", rates.compute, 1e9), OperationCost("read", 1e9, rates.memory_bandwidth)
        assert dynamic_joules([gemm], machine, power) + idle == pytest.approx(power.joules_per_flop * gemm.flops)
        assert dynamic_joules([read], machine, power) + idle == pytest.approx(power.joules_per_byte * read.memory_bytes)
        both = dynamic_joules([gemm, read], machine, power) + idle
        assert both == pytest.approx(gpus * (0.974 * 666 + 0.13e-9 * 4.6e12 - 126))


def test_power_is_unknown_where_nobody_measured() -> None:
    assert estimate(model("llama-3-8b"), Machine(A100), Workload(1024, 512)).power_time() is None
    assert [a.name for a in ACCELERATORS.values() if a.measured.power] == ["h200"]


@pytest.mark.parametrize("window", [None, 3, 7, 100])
def test_attention_is_counted_pair_by_pair(window: int | None) -> None:
    """FLOPs of the engine's attention against every (query, key) pair of one request's life."""
    config = replace(shape("mistral-7b"), sliding_window=window)
    prompt, output = 6, 8
    tokens = prompt + output  # one request's whole life in one step
    costs = {
        cost.name: cost for cost in operation_costs(declare(config), Workload(prompt, output), tokens)
    }  # a step's mix is a request's
    per_pair = 4 * config.num_heads * config.head_dim * config.num_layers

    def pairs(first: int, count: int) -> float:
        """Keys in sight, over positions, each half a token deep into its own."""
        steps = 1000
        points = (first + (i + 0.5) / steps for i in range(count * steps))
        return sum(x if window is None else min(x, window) for x in points) / steps

    assert costs["prefill_attention"].flops == pytest.approx(per_pair * pairs(0, prompt), rel=1e-4)
    assert costs["decode_attention"].flops == pytest.approx(per_pair * pairs(prompt, output), rel=1e-4)
    rows = VALUE_BYTES * config.num_layers * 2 * config.num_heads * config.head_dim  # q in, attn out
    kv = kv_bytes_per_token(config)
    assert costs["decode_attention"].memory_bytes == pytest.approx(output * rows + kv * pairs(prompt, output), rel=1e-4)
    assert costs["prefill_attention"].memory_bytes == prompt * (rows + kv)


def test_experts_are_counted_draw_by_draw() -> None:
    """FLOPs by the experts a token meets; weights by the experts that at least one token of the batch meets."""
    config = shape("mixtral-8x7b")
    rows, experts, chosen = 2, config.num_experts, config.experts_per_token
    costs = {cost.name: cost for cost in operation_costs(declare(config), Workload(1, 1), rows)}
    down = config.hidden_size * config.intermediate_size
    assert costs["moe_down_proj"].flops == 2 * rows * chosen * down * config.num_layers
    draws = list(itertools.product(itertools.combinations(range(experts), chosen), repeat=rows))
    met = sum(len(set().union(*draw)) for draw in draws) / len(draws)
    traffic = rows * (chosen * config.intermediate_size + 2 * config.hidden_size + 2 * chosen)  # residual, routing
    values = (met * down + traffic) * config.num_layers
    assert costs["moe_down_proj"].memory_bytes == pytest.approx(values * VALUE_BYTES)


def test_the_largest_batch_fills_the_memory() -> None:
    found = estimate(model("llama-3-8b"), Machine(H200), Workload(1024, 512))
    used = VALUE_BYTES * found.parameters + found.requests * 1280 * 131_072
    assert found.machine.memory - 1280 * 131_072 < used <= found.machine.memory
    assert found.memory_time == pytest.approx(memory_time(found.machine), rel=0.01)
    half = estimate(
        model("llama-3-8b"), Machine(H200), Workload(1024, 512), dense_batch=found.max_dense_batch.__floor__() // 2
    )
    assert half.memory_time < found.memory_time
    assert half.compute_time == pytest.approx(found.compute_time / 2, rel=0.01)


def test_gemms_are_compute_bound_from_the_batch_it_says() -> None:
    found = estimate(model("llama-3-8b"), Machine(H200), Workload(1024, 512))
    rates, batch, values = found.machine.rates, found.compute_bound_batch, 4096 * 14_336
    assert 2 * batch * values / rates.compute >= VALUE_BYTES * values / rates.memory_bandwidth
    assert 2 * (batch - 1) * values / rates.compute < VALUE_BYTES * values / rates.memory_bandwidth


SPLIT = ("rope_append", "decode_attention", "prefill_attention")  # by heads, their buffers with them


@pytest.mark.parametrize("name", ["llama-3-8b", "mixtral-8x7b", "qwen2-72b"])
@pytest.mark.parametrize("counting", list(Counting))
def test_tensor_parallelism_shares_the_work_and_adds_the_network(name: str, counting: Counting) -> None:
    alone = {c.name: c for c in operation_costs(model(name), Workload(512, 512), 2048, 1, counting)}
    shared = {c.name: c for c in operation_costs(model(name), Workload(512, 512), 2048, 4, counting)}
    assert shared.keys() - alone.keys() == {"all_reduce"}
    assert not any(cost.network_bytes for cost in alone.values())
    for key, cost in alone.items():
        assert shared[key].flops == cost.flops
        copies = counting is Counting.ENGINE and key not in SPLIT  # rows of the hidden state on every GPU
        assert (shared[key].memory_bytes > cost.memory_bytes) == copies


def test_bounds_are_in_order() -> None:
    found = estimate(model("llama-3-70b"), Machine(H200, 8), Workload(1024, 512))
    for rates in (found.machine.rates, found.machine.measured_rates):
        assert found.overlapped_time(rates) < found.sequential_time(rates)
    assert found.sequential_time(found.machine.rates) < found.sequential_time(found.machine.measured_rates)
    assert found.total.network_bytes == pytest.approx(
        4 * 7 * found.dense_batch * 8192 * VALUE_BYTES * 80
    )  # Eq. 3 and the operations agree


def test_more_gpus_than_kv_heads_copy_the_kv() -> None:
    config = shape("qwen2-7b")  # 28 heads, 4 KV heads
    assert kv_bytes_per_token(config, 28) == 7 * kv_bytes_per_token(config, 4) == 7 * kv_bytes_per_token(config, 1)


UNKNOWN = Accelerator("new", "New GPU", 1e12, 1e12, None, 1e15)


@pytest.mark.parametrize(
    ("machine", "workload", "dense_batch", "message"),
    [
        (Machine(H200, 3), Workload(1, 1), None, r"^--tp: must be one of 1, 2, 4, 8, 16, 32, which split the heads"),
        (Machine(H200, 0), Workload(1, 1), None, r"^--tp: must be one of .*, not 0$"),
        (Machine(UNKNOWN, 2), Workload(1, 1), None, r"^--tp: must be 1 on New GPU"),
        (Machine(ACCELERATORS["v100"]), Workload(1, 1), None, r"^--tp: 16\.1 GB of weights .* the 16 GB of 1 × V100"),
        (Machine(H200), Workload(0, 1), None, r"^--input-len: must be at least 1, not 0"),
        (Machine(H200), Workload(1, math.nan), None, r"^--output-len: must be at least 1, not nan"),
        (Machine(H200), Workload(8000, 200), None, r"^--input-len: 8000 and --output-len 200 .* 8192 positions"),
        (Machine(H200), Workload(1024, 512), 0, r"^--dense-batch-size: must be 1 to 2234, "),
        (Machine(H200), Workload(1024, 512), 2235, r"^--dense-batch-size: must be 1 to 2234, "),
    ],
)
def test_what_cannot_be_is_one_sentence(
    machine: Machine, workload: Workload, dense_batch: int | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        estimate(model("llama-3-8b"), machine, workload, dense_batch=dense_batch)
