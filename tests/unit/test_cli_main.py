"""The frame of the command line: help, versions, unknown words, exit codes, tracebacks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import nf
import nf.cli.info
import nf.loading
from nf.cli import main
from nf.cli.main import build_parser
from nf.device_choice import DeviceChoice
from nf.errors import EngineError, InputError
from nf.kernels.registry import KernelOrigin


def exits(argv: list[str]) -> int:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize(
    "argv",
    [
        [*command, "--help"]
        for command in (
            [],
            ["generate"],
            ["plan"],
            ["plan", "show"],
            ["plan", "profile"],
            ["plan", "search"],
            ["plan", "shares"],
            ["plan", "validate"],
            ["plan", "estimate"],
            ["compile"],
            ["bench"],
            ["bench", "throughput"],
            ["bench", "latency"],
            ["bench", "kernels"],
            ["info"],
        )
    ],
)
def test_help_fits_100_columns_and_has_examples(
    argv: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert exits(argv) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    assert "examples:" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exits(["--version"]) == 0
    assert capsys.readouterr().out == f"nf {nf.__version__}\n"


def test_help_needs_none_of_the_heavy_modules() -> None:
    code = "import sys; from nf.cli.main import build_parser; build_parser().format_help(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"numpy", "tokenizers", "asyncio", "tqdm", "json", "importlib.metadata"} & set(done.stdout.split())


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["generate", "-p", "x", "--temprature", "1"], "--temprature: unknown option; did you mean --temperature?\n"),
        (["generate", "-p", "x", "--zzz"], "nf generate: --zzz: unknown option; see nf generate --help\n"),
        (["generate", "m", "-p", "x", "more"], "nf generate: more: unknown argument; see nf generate --help\n"),
        (["generate", "-p", "x", "--temp", "1"], "--temp: unknown option"),
        (["generate", "-p", "x", "--top-k", "many"], "--top-k: must be an integer, not 'many'"),
        (["generate", "-p", "x", "--min-p", "many"], "--min-p: must be a number, not 'many'"),
        (["generate", "-p", "x", "--stop-token-ids", "a"], "--stop-token-ids: takes token ids such as 13,198"),
        (["generate", "-p", "x", "--logit-bias", "5"], "--logit-bias: takes pairs such as 13:-100"),
        (["generate", "-p", "x", "--device", "tpu"], "--device: invalid choice: 'tpu'"),
        (["generate", "-p"], "--prompt: expected one argument"),
        (["genrate"], "invalid choice: 'genrate'"),
    ],
)
def test_wrong_words_are_one_sentence_and_exit_code_2(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exits(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1


def test_no_command_shows_the_help_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "commands:" in err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("--x", "must be y"), 2, "nf info: --x: must be y\n"),
        (EngineError("the engine failed: why"), 1, "nf info: the engine failed: why\n"),
        (FileNotFoundError(2, "No such file or directory", "/f"), 1, "nf info: /f: No such file or directory\n"),
        (MemoryError(), 1, "nf info: out of memory; a smaller"),
        (ZeroDivisionError("oh"), 1, "nf info: unexpected ZeroDivisionError: oh (--debug shows where)\n"),
        (KeyboardInterrupt(), 130, "nf: stopped\n"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_errors_become_a_sentence_and_a_code(
    error: BaseException,
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nf.cli.info, "run", raising(error))
    assert main(["info"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(said)
    assert "Traceback" not in err


@pytest.mark.parametrize("argv", [["--debug", "info"], ["info", "--debug"]])
def test_debug_shows_the_traceback(
    argv: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nf.cli.info, "run", raising(InputError("--x", "must be y")))
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("nf info: --x: must be y\n")


def raising(error: BaseException) -> Callable[[object], int]:
    def run(_args: object) -> int:
        raise error

    return run


def test_every_command_takes_debug() -> None:
    assert "--debug" in build_parser().format_help()


class Driver(ModuleType):
    """The calls of cuda.bindings.driver that `nf info` makes, on a machine with one GPU or with the error given."""

    def __init__(self, error: int = 0) -> None:
        super().__init__("cuda.bindings.driver")
        names = ("COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR", "MULTIPROCESSOR_COUNT")
        attributes = {f"CU_DEVICE_ATTRIBUTE_{name}": value for name, value in zip(names, (9, 0, 132), strict=True)}
        self.CUdevice_attribute = SimpleNamespace(**attributes)
        self.cuInit = lambda _flags: (error,)
        self.cuDeviceGetCount = lambda: (0, 1)
        self.cuDeviceGet = lambda ordinal: (0, ordinal)
        self.cuDriverGetVersion = lambda: (0, 13010)
        # As the driver fills it: what stands after the end of the name is anything.
        self.cuDeviceGetName = lambda length, _device: (0, b"NVIDIA H200\0".ljust(length - 1, b"\0") + b"\n")
        self.cuDeviceTotalMem = lambda _device: (0, 141 << 30)
        self.cuDeviceGetAttribute = lambda attribute, _device: (0, attribute)


def use_driver(monkeypatch: pytest.MonkeyPatch, driver: ModuleType | None) -> None:
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)  # None makes the import fail


def test_info_shows_the_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    use_driver(monkeypatch, Driver())
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "NVIDIA H200, compute capability 9.0, 132 SMs, 141.0 GiB, driver for CUDA 13.1" in text


@pytest.mark.parametrize(
    ("driver", "why"),
    [(None, "cuda-python is not installed"), (Driver(error=100), "the CUDA driver cannot be used (100)")],
)
def test_info_says_why_there_is_no_gpu(
    driver: ModuleType | None, why: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_driver(monkeypatch, driver)
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gpus"] == []
    assert why in found["executor"]["reason"]


@pytest.mark.parametrize("model", ["llama-3-8b", "nf-tiny"])
def test_info_about_a_model(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", model]) == 0
    assert "executor      cpu: no GPU" in capsys.readouterr().out


def test_info_about_a_model_without_gpu_kernels(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_driver(monkeypatch, Driver())
    monkeypatch.setattr("nf.device_choice._gpu_problem", lambda _gpu: None)
    monkeypatch.setattr("nf.device_choice.find_kernels", lambda: KernelOrigin((), "sm_90a", Path("kernels"), None))
    assert main(["info", "llama-3.1-405b", "--json"]) == 0
    executor = json.loads(capsys.readouterr().out)["executor"]
    assert executor["name"] == "cpu"
    assert "must be 1 to 8 times num_kv_heads (8), not 128" in executor["reason"]
    assert main(["info", "llama-3-8b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["executor"]["name"] == "cuda"
    assert main(["info", "no/such/model", "--json"]) == 2


def test_info_as_text_and_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NF_CACHE_DIR", "/somewhere/else")
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["nf"] is not None
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["cpu"]["cores"] >= 1
    assert found["cpu"]["memory"] > 1 << 28
    assert found["cache_dir"] == "/somewhere/else"
    assert found["executor"]["name"] == "cpu"
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "/somewhere/else" in text
    assert found["executor"]["reason"].split()[0] in text


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["compile", "--arch", "sm_80"], "nf compile: --arch: must be one of sm_90a, not 'sm_80'\n"),
        (
            ["bench", "kernels", "--only", "gem"],
            "nf bench kernels: --only: must be one of gemm, moe, decode_attention, ",
        ),
    ],
)
def test_kernel_commands_name_what_they_do_not_know(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert capsys.readouterr().err.startswith(said)


def test_a_gpu_that_is_left_alone_is_told_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = DeviceChoice("cpu", "the kernels are not compiled", leaves_gpu=True)
    monkeypatch.setattr(nf.loading, "choose_device", lambda *_: choice)
    for _ in range(2):
        assert main(["generate", "-p", "import os", "--max-tokens", "1", "--no-stream"]) == 0
        warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
        assert warnings == ["nf: warning: runs on cpu: the kernels are not compiled"]
