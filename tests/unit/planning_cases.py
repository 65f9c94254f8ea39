"""What the planning tests plan for: the layers that NanoFlow's authors searched, on an A100, and a small made-up GPU.

The durations are those of the authors' published search (github.com/efeslab/Nanoflow, autosearch/search-70.ipynb and
autosearch/trace, commit d1bbe27): of the nano-operations in its printed Stage I results, and its tables of decode
attention at 1024 tokens of context and of collectives. KQV is counted twice in theirs, and so it is here. Where they
print no full-size GEMM, Table 2 of the paper (arXiv 2408.12757) has it, a layer being an 80th of its totals. Their
results: 1.73 ms per layer for 8B on one GPU (1024 tokens, 384 of them decode), 2.347 ms for 70B on eight (2048, 1280).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nf.graphs.plan_store import shape_name
from nf.models.operations import Operation, Resource, Rows
from nf.models.registry import declare
from nf.models.shapes import shape
from nf.planning.interference import A100_PUBLISHED
from nf.planning.nano_layer import BatchShape, CostOf, profiled_costs
from nf.planning.operation_costs import Workload, operation_costs
from nf.planning.profile import CoRun, Profile, ProfileKey, Side, Solo

A100 = ProfileKey("A100 80GB SXM", "unknown", "published")
Milliseconds = Mapping[int, float]

BATCH_8B = BatchShape(1024, 384)
BATCH_70B = BatchShape(2048, 1280)
PUBLISHED_8B = 1.73e-3  # seconds per layer, Stage I
PUBLISHED_70B = 2.35e-3


def class_of(operation: Operation) -> str:
    """In the paper every resource class is a lane, prefill attention one of the memory-bound operations."""
    return str(operation.resource)


def layer_8b() -> tuple[Operation, ...]:
    compute, memory = Resource.COMPUTE, Resource.MEMORY
    return (
        Operation("KQV", compute, ("hidden",), ("qkv",)),
        Operation("DecAttn", memory, ("qkv",), ("attn",), rows=Rows.DECODE),
        Operation("PfAttn", memory, ("qkv",), ("attn",), rows=Rows.PREFILL),
        Operation("O", compute, ("attn",), ("out",)),
        Operation("UG", compute, ("out",), ("activated",)),
        Operation("D", compute, ("activated",), ("hidden",)),
    )


def layer_70b_all_reduce() -> tuple[Operation, ...]:
    """Tensor parallel, an all-reduce after O and after D."""
    network = Resource.NETWORK
    kqv, decode, prefill, o, *_ = layer_8b()
    return (
        kqv,
        decode,
        prefill,
        o,
        Operation("AR_O", network, ("out",), ("mixed",)),
        Operation("UG", Resource.COMPUTE, ("mixed",), ("activated",)),
        Operation("D", Resource.COMPUTE, ("activated",), ("partial",)),
        Operation("AR_D", network, ("partial",), ("hidden",)),
    )


def layer_70b_all_gather() -> tuple[Operation, ...]:
    """The equivalent form with an all-gather before and after O in place of the first all-reduce."""
    kqv, decode, prefill, _, _, ug, d, ar_d = layer_70b_all_reduce()
    return (
        kqv,
        decode,
        prefill,
        Operation("AG_attn", Resource.NETWORK, ("attn",), ("heads",)),
        Operation("O", Resource.COMPUTE, ("heads",), ("out",)),
        Operation("AG_O", Resource.NETWORK, ("out",), ("mixed",)),
        ug,
        d,
        ar_d,
    )


GATHER = {512: 0.0675, 640: 0.0815, 768: 0.093, 896: 0.1058, 1024: 0.1189, 1280: 0.1471, 1408: 0.1571, 2048: 0.2207}
SCATTER = {512: 0.0594, 640: 0.0687, 768: 0.0756, 896: 0.0864, 1024: 0.0933, 1280: 0.1104, 1408: 0.1209, 2048: 0.1625}
REDUCE = {tokens: GATHER[tokens] + SCATTER[tokens] for tokens in GATHER}

MS_8B: Mapping[str, Milliseconds] = {
    "KQV": {256: 0.0557, 384: 0.0839, 640: 0.138, 768: 0.156},
    "DecAttn": {128: 0.3492, 256: 0.6642, 384: 0.997},
    "PfAttn": {128: 0.0125, 640: 0.0625},
    "O": {384: 0.0561, 640: 0.0887},
    "UG": {384: 0.356, 640: 0.555},
    "D": {384: 0.177, 640: 0.27},
}
MS_70B: Mapping[str, Milliseconds] = {
    "KQV": {256: 0.086, 384: 0.100, 640: 0.155, 768: 0.162, 2048: 0.402},
    "DecAttn": {128: 0.0752, 256: 0.1156, 512: 0.1963, 1024: 0.3615, 1280: 0.4427},
    "PfAttn": {128: 0.00625, 768: 0.0375},
    "O": {640: 0.058, 1408: 0.104, 2048: 0.2},
    "UG": {640: 0.287, 1408: 0.587, 2048: 0.874},
    "D": {640: 0.138, 1408: 0.313, 2048: 0.437},
    "AR_O": REDUCE,
    "AR_D": REDUCE,
    "AG_attn": GATHER,
    "AG_O": GATHER,
}


def a100_profile(model: str, table: Mapping[str, Milliseconds]) -> Profile:
    profile = Profile(A100, model, gpu_sms=108)
    for operation, times in table.items():
        for tokens, ms in times.items():
            profile.add(Solo(operation, tokens, "all", 0, ms * 1e-3, float("nan")))
    return profile


def costs_8b() -> CostOf:
    return profiled_costs(a100_profile("8B", MS_8B), BATCH_8B)


def costs_70b() -> CostOf:
    return profiled_costs(a100_profile("70B TP 8", MS_70B), BATCH_70B)


GPU_SMS = 132
IDLE, CAP = 126.0, 700.0


def made_up_profile(operations: tuple[Operation, ...], *, kept: float, speed: float, watts: float = CAP) -> Profile:
    """A GPU with plain rules: every compute-bound operation has a fixed cost and one per row, attention one per row.

    Partitions divide compute evenly, while memory-bound operations reach their full speed on 48 SMs. Beside each other,
    operations keep ``kept`` and ``speed`` of what they do alone on the same SMs.
    """
    profile = Profile(ProfileKey("made-up", "1.0", "test"), "llama", GPU_SMS, IDLE, CAP)
    weight = {"qkv_proj": 1.5, "o_proj": 1.0, "gate_up_proj": 7.0, "down_proj": 3.5, "decode_attention": 8.0}
    counts = (16, 32, 48, 84, 100, 116)

    def seconds(operation: Operation, rows: int, sms: int) -> float:
        bound = operation.resource is Resource.MEMORY
        slower = max(1.0, 48 / sms) if bound else GPU_SMS / sms
        fixed = 0.0 if operation.rows is Rows.DECODE else 5e-6
        return (fixed + rows * 1e-7 * weight.get(operation.name, 0.1)) * slower

    for operation in operations:
        for sms in ("all", *counts):
            for rows in (128, 1024, 2048):
                time = seconds(operation, rows, GPU_SMS if sms == "all" else sms)
                profile.add(Solo(operation.name, rows, sms, 0, time, CAP * time))
    gate_up = next(o for o in operations if o.name == "gate_up_proj")
    attention = next(o for o in operations if o.name == "decode_attention")
    for own in (16, 32, 48):
        first, second = seconds(gate_up, 1024, GPU_SMS - own) / kept, seconds(attention, 1024, own) / speed
        pair = Side("gate_up_proj", 1024, GPU_SMS - own, 0, first), Side("decode_attention", 1024, own, 0, second)
        profile.add(CoRun(*pair, watts))
    first, second = seconds(gate_up, 1024, GPU_SMS) / kept, seconds(attention, 1024, GPU_SMS) / speed
    pair = Side("gate_up_proj", 1024, "all", 0, first), Side("decode_attention", 1024, "all", 0, second)
    profile.add(CoRun(*pair, watts))
    return profile


EXAMPLE_KEY = ProfileKey("A100 80GB SXM", "example", "from NanoFlow's published tables; not measured by nf")
EXAMPLE_NAMES = {
    **{"KQV": "qkv_proj", "DecAttn": "decode_attention", "PfAttn": "prefill_attention"},
    **{"O": "o_proj", "UG": "gate_up_proj", "D": "down_proj"},
}


def example_profile() -> Profile:
    """docs/examples/a100-nanoflow.json: the tables of 8B, and the published R → P as partitions of 108 SMs.

    Norms and rotations, of which nothing is published, take as long as reading and writing their bytes at 2 TB/s.
    Energies are not published. Decode attention is at 1024 tokens of context.
    """
    model = declare(shape("llama-3-8b"))
    profile = Profile(EXAMPLE_KEY, shape_name(model.config), gpu_sms=108)
    nan, layers = float("nan"), model.config.num_layers
    for theirs, times in MS_8B.items():
        for tokens, ms in times.items():
            context = 1024 if theirs == "DecAttn" else 0
            profile.add(Solo(EXAMPLE_NAMES[theirs], tokens, "all", context, ms * 1e-3, nan))
    for cost in operation_costs(model, Workload(1024, 512), 1024):
        if cost.name in ("attn_norm", "rope_append", "ffn_norm"):
            profile.add(Solo(cost.name, 1024, "all", 0, cost.memory_bytes / layers / 2e12, nan))
    attention, gemm = MS_8B["DecAttn"][384] * 1e-3, MS_8B["UG"][640] * 1e-3
    published = [(point.share, point.speed) for point in A100_PUBLISHED["memory"]]
    for sms in range(16, 105, 8):
        share = sms / 108
        speed = float(np.interp(share, *zip(*published, strict=True)))
        # Alone on its SMs each is as fast as beside the other.
        profile.add(Solo("decode_attention", 384, sms, 1024, attention / speed, nan))
        profile.add(Solo("gate_up_proj", 640, 108 - sms, 0, gemm / (1 - share), nan))
        first = Side("gate_up_proj", 640, 108 - sms, 0, gemm / (1 - share))
        profile.add(CoRun(first, Side("decode_attention", 384, sms, 1024, attention / speed), nan))
    return profile
