"""How fast SM partitions read memory, by which SMs they have.

    python scripts/bench_partitions.py [--json FILE]      # on the GPU, needs cupy; a minute and a half

The driver lists SMs in pairs. A partition of 20 can be what it gives for that number in one piece, or ten pairs: spread
over the list, as plans have them, the first, or the last. Where they differ, SMs share a part of the way to memory.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nf.bench.environment import environment, write_record
from nf.bench.kernels import Bench
from nf.bench.measure import need_cupy
from nf.cli.files import check_writable
from nf.cli.parser import CommandParser
from nf.device_choice import need_gpu
from nf.errors import NfError
from nf.graphs.partition import BY_PAIRS, SmPartition, partition_of, partitions, sm_pairs
from nf.graphs.pipeline_plan import PAIR
from nf.kernels.device import checked
from nf.kernels.registry import all_sources


def unions(pairs: int, count: int) -> Iterator[tuple[str, list[int]]]:
    """Ways to take ``count`` of so many pairs, by their indices, beside the engine's own."""
    yield "the first", list(range(count))
    yield "the last", list(range(pairs - count, pairs))


def arrangements(sms: int) -> Iterator[tuple[str, SmPartition]]:
    """(name, partition) of so many SMs."""
    from cuda.bindings import driver

    yield "spread", partitions((sms,))[0]
    device = checked(driver.cuDeviceGet(0))
    whole = checked(driver.cuDeviceGetDevResource(device, driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM))
    groups, *_ = checked(driver.cuDevSmResourceSplitByCount(1, whole, BY_PAIRS, sms))
    yield "the driver's", partition_of(groups, device)
    pairs = sm_pairs(device)
    for name, chosen in unions(len(pairs), sms // PAIR):
        yield name, partition_of([pairs[index] for index in chosen], device)


def rows(counts: Sequence[int]) -> Iterator[dict[str, Any]]:
    bench = Bench(all_sources())
    for sms in counts:
        streams = [("no partition, so many CTAs", None)]
        streams += [(name, partition.stream()) for name, partition in arrangements(sms)]
        for name, stream in streams:
            row = {"sms": sms, "which": name, "bytes_per_second": bench.read_rate(sms, stream)}
            print(f"{sms:4} SMs, {name:28} {row['bytes_per_second'] / 1e12:.2f} TB/s", flush=True)
            yield row


def main() -> int:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--sms", type=int, nargs="+", default=[12, 16, 20, 24, 32], help="even numbers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a record")
    args = parser.parse_args()
    for sms in args.sms:
        if sms < PAIR or sms % PAIR:
            parser.error(f"--sms: must be even and at least {PAIR}, not {sms}")
    try:
        check_writable("--json", args.json)
        need_gpu()
        need_cupy()
        record = {"benchmark": "partitions", "environment": environment(), "rows": list(rows(args.sms))}
    except NfError as error:
        print(f"bench_partitions: {error}", file=sys.stderr)
        return 1
    if args.json is not None:
        write_record(args.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
