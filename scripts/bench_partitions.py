"""How fast SM partitions read memory, by which SMs they have.

    python scripts/bench_partitions.py [--json FILE]      # on the GPU, needs cupy; a minute and a half

The driver gives SMs in groups of 8. A partition of 32 can be what it gives for that number, or a union of four groups:
the first, every second, or four spread over the chip. Where they differ, groups share a part of the way to memory.
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
from nf.graphs.partition import SmPartition, partitions
from nf.kernels.device import checked
from nf.kernels.registry import all_sources

GROUP = 8  # SMs


def unions(groups: int, count: int) -> Iterator[tuple[str, list[int]]]:
    """Ways to take ``count`` of so many groups, by their indices."""
    yield "the first", list(range(count))
    yield "the last", list(range(groups - count, groups))
    if 2 * count <= groups:
        yield "every second", list(range(0, 2 * count, 2))
    yield "spread", [index * groups // count for index in range(count)]


def arrangements(sms: int) -> Iterator[tuple[str, SmPartition]]:
    """(name, partition) of so many SMs."""
    from cuda.bindings import driver

    yield "the driver's", partitions((sms,))[0]
    device = checked(driver.cuDeviceGet(0))
    whole = checked(driver.cuDeviceGetDevResource(device, driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM))
    groups, count, _ = checked(driver.cuDevSmResourceSplitByCount(whole.sm.smCount // GROUP, whole, 0, GROUP))
    for name, chosen in unions(count, sms // GROUP):
        description = checked(driver.cuDevResourceGenerateDesc([groups[index] for index in chosen], len(chosen)))
        flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
        yield f"{name} {chosen}", SmPartition(sms, checked(driver.cuGreenCtxCreate(description, device, flags)))


def rows(counts: Sequence[int]) -> Iterator[dict[str, Any]]:
    bench = Bench(all_sources())
    for sms in counts:
        streams = [("no partition, so many CTAs", None)]
        streams += [(name, partition.stream()) for name, partition in arrangements(sms)]
        for name, stream in streams:
            row = {"sms": sms, "which": name, "bytes_per_second": bench.read_rate(sms, stream)}
            print(f"{sms:4} SMs, {name:44} {row['bytes_per_second'] / 1e12:.2f} TB/s", flush=True)
            yield row


def main() -> int:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--sms", type=int, nargs="+", default=[16, 24, 32, 48], help="multiples of 8")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a record")
    args = parser.parse_args()
    for sms in args.sms:
        if sms < GROUP or sms % GROUP:
            parser.error(f"--sms: must be multiples of {GROUP}, not {sms}")
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
