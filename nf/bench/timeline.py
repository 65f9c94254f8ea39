"""Spans as a file that Perfetto (ui.perfetto.dev) and chrome://tracing open, with one row per stream.

The format is the Trace Event Format.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nf.executors.trace import Span


def trace_events(spans: Sequence[Span], process: str = "nf") -> dict[str, Any]:
    """Spans as complete events (microseconds), streams as threads of one process in the order they first appear."""
    rows = {stream: row for row, stream in enumerate(dict.fromkeys(span.stream for span in spans))}
    names = [_name("process_name", 0, process), *(_name("thread_name", row, stream) for stream, row in rows.items())]
    order = [
        {"ph": "M", "name": "thread_sort_index", "pid": 0, "tid": row, "args": {"sort_index": row}}
        for row in rows.values()
    ]
    events = [
        {
            "ph": "X",
            "name": span.name,
            "cat": span.name.split()[0],  # the operation, so that all of its nano-operations can be chosen together
            "pid": 0,
            "tid": rows[span.stream],
            "ts": span.start_us,
            "dur": span.duration_us,
        }
        for span in spans
    ]
    return {"traceEvents": [*names, *order, *events], "displayTimeUnit": "ns"}


def write_timeline(spans: Sequence[Span], path: Path, process: str = "nf") -> None:
    path.write_text(json.dumps(trace_events(spans, process)) + "\n")


def _name(what: str, row: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": 0, "tid": row, "args": {"name": name}}
