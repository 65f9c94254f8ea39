"""Results of the engine's benchmarks as text."""

from __future__ import annotations

from typing import Any

from nf.bench.step_table import step_lines

WIDTH = 16


def throughput_lines(record: dict[str, Any]) -> list[str]:
    """A table of one run, "-" where this machine does not tell, and of one of its steps if that was traced."""
    results, startup = record["results"], dict(record["results"]["startup"])
    rates, memory, middle = results["tokens_per_second"], results["memory"], results["steady"]
    total, first_token = startup.pop("total"), startup.pop("first_token")
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in startup.items())
    rate, joules, watts = results["requests_per_second"], results["joules_per_token"], results["watts"]
    steps, preemptions = results["steps"], results["preemptions"]
    preempted = f", {preemptions:,} preemptions" if preemptions else ""
    rows = [
        ("run", _title(record)),
        (
            "throughput",
            f"{_rates(rates)}, {rate:.2f} requests/s in {results['seconds']:.2f} s",
        ),
        ("steady", "-" if middle is None else f"{_rates(middle)}: the middle half of the tokens"),
        ("energy", "-" if joules is None else f"{joules:.4f} J/token, {watts:.0f} W{_clock(results['sm_megahertz'])}"),
        *_ceiling_rows(results),
        *((name.upper(), _percentiles(results[name], 1e3, "ms")) for name in ("ttft", "tpot")),
        (
            "steps",
            f"{steps['count']:,}, {steps['mean_tokens']:,.1f} tokens on average{preempted}",
        ),
        ("memory", f"host {_size(memory['host'])}, GPU {_size(memory['gpu'])}"),
        ("start-up", f"{total:.2f} s: {parts}; first token after {first_token:.2f} s"),
    ]
    step = results["step"]
    return [*(f"{name:<{WIDTH}}{text}" for name, text in rows), *(["", *step_lines(step)] if step else [])]


def latency_title(record: dict[str, Any]) -> list[str]:
    """What stands above the rates' lines."""
    head = f"{'requests/s':>10} {'achieved':>8} {'ms per output token':^31} {'TTFT ms':^23} {'TPOT ms':^23}"
    kinds = " ".join([f"{'mean':>7} {'p50':>7} {'p90':>7} {'p99':>7}", *[f"{'p50':>7} {'p90':>7} {'p99':>7}"] * 2])
    return [_title(record), head.rstrip(), f"{'':19} {kinds}"]


def latency_line(rate: dict[str, Any]) -> str:
    """One rate's results; times in milliseconds."""
    cells = [f"{rate['request_rate']:10.2f}", f"{rate['achieved_rate']:8.2f}"]
    for name, kinds in (("normalized_latency", ("mean", "p50", "p90", "p99")), *_TAILS):
        summary = rate[name]
        cells += [f"{'-':>7}" if summary is None else f"{_short(summary[kind] * 1e3):>7}" for kind in kinds]
    return " ".join(cells)


_TAILS = tuple((name, ("p50", "p90", "p99")) for name in ("ttft", "tpot"))


def _title(record: dict[str, Any]) -> str:
    options, workload = record["options"], record["workload"]
    count = workload["requests"]
    means = f"{workload['input_tokens'] / count:,.0f} in / {workload['output_tokens'] / count:,.0f} out"
    trace = "" if workload["name"] == means.replace(",", "") else f" ({workload['name']})"
    requests = "request" if count == 1 else "requests"
    plan, *others = options["plan"].split("; ")
    plans = f"plan {plan}" + (f" and {len(others)} for certain steps" if others else "")
    return f"{record['model']} on {options['device']}, {plans}, {count:,} {requests} of {means}{trace}"


def _clock(megahertz: float | None) -> str:
    return "" if megahertz is None else f", SMs at {megahertz:,.0f} MHz"


def _rates(rates: dict[str, float]) -> str:
    return f"{rates['total']:,.1f} tokens/s (in {rates['input']:,.1f}, out {rates['output']:,.1f})"


def _ceiling_rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    ceilings = results["ceilings"]
    if ceilings is None:
        return [("Eq. 5", "-"), ("power roofline", "-")]
    parameters = results["active_parameters"] / 1e9
    power = "-"
    if ceilings["power_roofline"] is not None:
        power = (
            f"{ceilings['share_of_power_roofline']:.1%} of {ceilings['power_roofline']:,.0f} tokens/s "
            f"({ceilings['watts']:.0f} W, {ceilings['joules_per_flop'] * 1e12:.2f} pJ/FLOP, "
            f"{ceilings['joules_per_byte'] * 1e9:.3f} nJ/B)"
        )
    operations = (
        f"{ceilings['share_of_eq5']:.1%} of {ceilings['eq5']:,.0f} tokens/s "
        f"({ceilings['flops'] / 1e12:.0f} TFLOP/s, {parameters:.2f} B active parameters)"
    )
    return [("Eq. 5", operations), ("power roofline", power)]


def _percentiles(summary: dict[str, float] | None, scale: float, unit: str) -> str:
    if summary is None:
        return "-"
    return ", ".join(f"{kind} {_short(value * scale)}" for kind, value in summary.items()) + f" {unit}"


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _size(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.2f} GiB"
