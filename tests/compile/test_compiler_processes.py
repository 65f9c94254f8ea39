"""Compilers in processes of their own, with a kernel that takes a second: what ends them, and what becomes of that."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nf.kernels.compiler_processes import CompilerProcessError, CompilerProcesses
from nf.kernels.registry import all_sources

ARCH = "sm_90a"
KERNELS = {source.name: source for source in all_sources()}
SCRIPT = """
from pathlib import Path
from nf.kernels.compile import compile_kernels
from nf.kernels.registry import all_sources
print("once")
kernels = [source for source in all_sources() if source.name in ("embed", "stamp")]
print(*sorted(made.source.name for made in compile_kernels(kernels, "sm_90a")))
"""


@pytest.mark.parametrize("way", ["file", "standard input"])
def test_a_script_need_not_know_of_processes(tmp_path: Path, way: str) -> None:
    """As one with multiprocessing must, which would run it again."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script if way == "file" else "-"],
        input=None if way == "file" else SCRIPT,
        env=os.environ | {"NF_CACHE_DIR": str(tmp_path / "cache")},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "once\nembed stamp\n", "")


def test_a_refused_source_and_an_ended_process_do_not_end_the_others() -> None:
    stamp = KERNELS["stamp"]
    with CompilerProcesses(1) as compilers:
        with pytest.raises(CompilerProcessError, match="error: "):
            compilers.compile(replace(stamp, config=(("stamp", "1 +"),)), ARCH)
        binary = compilers.compile(stamp, ARCH)
        assert binary.startswith(b"\x7fELF")
        (process,) = compilers._all
        os.kill(process._begun().pid, signal.SIGKILL)
        with pytest.raises(CompilerProcessError, match="its compiler ended with signal 9: for want of memory"):
            compilers.compile(stamp, ARCH)
        assert compilers.compile(stamp, ARCH) == binary


def test_what_is_under_way_can_be_stopped() -> None:
    failed: list[str] = []

    def compile_long() -> None:
        try:
            compilers.compile(KERNELS["sample_bf16"], ARCH)  # takes ten seconds and more
        except CompilerProcessError as error:
            failed.append(str(error))

    with CompilerProcesses(1) as compilers:
        thread = threading.Thread(target=compile_long)
        thread.start()
        time.sleep(1)
        running = compilers._all[0]._begun()
        compilers.stop()
        thread.join(5)
        assert not thread.is_alive()
    assert running.poll() == -signal.SIGKILL
    assert len(failed) == 1
    with pytest.raises(CompilerProcessError, match="stopped"):
        compilers.compile(KERNELS["stamp"], ARCH)


def test_they_end_with_a_parent_that_is_killed() -> None:
    code = """
import sys, time
from nf.kernels.compiler_processes import CompilerProcesses
compilers = CompilerProcesses(2)
print(*(process._begun().pid for process in compilers._all), flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.kill()
    deadline = time.monotonic() + 30
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "compilers go on without their parent"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
