"""Which device runs a model, and why: the GPU where there is one that can, else the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from nf.config import Device
from nf.errors import InputError, NfError

if TYPE_CHECKING:  # `nf --help` imports this
    from nf.kernels.registry import KernelOrigin
    from nf.models.declaration import Model, Weight

_CAPABILITY = "9.0"  # what the kernels are made for
_ARCH = "sm_90a"
_DRIVER_CUDA = (13, 0)  # the least that loads them


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """Where a model runs, and one sentence that says why."""

    name: Literal["cpu", "cuda"]
    reason: str
    leaves_gpu: bool = False  # there is a GPU, and nobody said that it should not be used
    kernels: KernelOrigin | None = None  # for a GPU


def choose_device(asked: Device, model: Model | None = None) -> DeviceChoice:
    """The device that ``asked`` comes to on this machine.

    Args:
        asked: "auto" takes the GPU if there is one that can run the model, else the CPU.
        model: None for any that there are kernels for.

    Raises:
        InputError: "cuda" was asked for and cannot be had; says why.
    """
    if asked == "cpu":
        return DeviceChoice("cpu", "it was asked for")
    gpus, no_gpu = gpu_devices()
    problem = f"no GPU: {no_gpu}" if no_gpu is not None else _gpu_problem(gpus[0])
    if problem is None:
        kernels = find_kernels()
        problem = kernels.problem or (model_problem(model) if model else None)
        if problem is None:
            reason = f"{gpus[0]['name']} is there, and the kernels for it come from {kernels.folder}"
            return DeviceChoice("cuda", reason, kernels=kernels)
    if asked == "cuda":
        raise InputError("device", f"'cuda' cannot be had: {problem}; use 'cpu' or 'auto'")
    return DeviceChoice("cpu", problem, leaves_gpu=no_gpu is None)


def need_gpu(model: Model | None = None) -> None:
    """Raise NfError, which says why, if this machine has no GPU that can run ``model``."""
    choice = choose_device("auto", model)
    if choice.name != "cuda":
        raise NfError(choice.reason)


def gpu_devices() -> tuple[list[dict[str, Any]], str | None]:
    """The GPUs cuda-python sees, and if there are none, why not in a few words."""
    try:
        driver: Any = import_module("cuda.bindings.driver")
    except ImportError:
        return [], "cuda-python is not installed (pip install 'nf[cuda]')"
    try:
        _call(driver.cuInit, 0)
        devices = [_call(driver.cuDeviceGet, i) for i in range(_call(driver.cuDeviceGetCount))]
        cuda = _call(driver.cuDriverGetVersion)
        found = [_gpu(driver, device, cuda) for device in devices]
    except Exception as error:  # no driver library, no device, a driver too old: each has its own type
        if type(error).__name__ == "DynamicLibNotFoundError":
            return [], "there is no CUDA driver (libcuda.so.1) here"
        return [], f"the CUDA driver cannot be used ({str(error).partition('. ')[0]})"
    return found, None if found else "the CUDA driver shows no device"


def find_kernels() -> KernelOrigin:
    """Where this machine has its kernels from, and if it cannot have them, why."""
    from nf.kernels.registry import all_sources, kernel_origin

    return kernel_origin(all_sources(), _ARCH)


def model_problem(model: Model) -> str | None:
    """Why there are no kernels for a model, None if there are."""
    from nf.kernels.kv_cache import PAGE_SIZES, check_shape
    from nf.kernels.moe import MoeShape
    from nf.kernels.rows import row_vectors

    config = model.config
    try:
        check_shape(config.num_heads, config.num_kv_heads, config.head_dim, PAGE_SIZES[0])
        row_vectors(config.hidden_size)
        if config.num_experts:
            MoeShape(config.hidden_size, config.num_experts, config.experts_per_token)
    except InputError as error:
        return f"there are no kernels for this model: {error}"
    if config.o_bias:
        return "there are no kernels for this model: its output projection has a bias"
    for weight in (*model.layer_weights, model.lm_head):
        problem = _product_problem(weight)
        if problem is not None:
            return f"there are no kernels for this model: {weight.name} {problem}"
    return None


def _product_problem(weight: Weight) -> str | None:
    """Why a GEMM cannot take a matrix, see nf.kernels.gemm; the router has a kernel of its own."""
    if len(weight.shape) < 2 or weight.name == "router":
        return None
    n, k = weight.shape[-2:]
    if n % 16 or k % 8 or k < 64:
        return f"is {n} × {k}, and a product needs multiples of 16 and 8, the second at least 64"
    return None


def _gpu_problem(gpu: dict[str, Any]) -> str | None:
    if gpu["compute_capability"] != _CAPABILITY:
        return (
            f"{gpu['name']} has compute capability {gpu['compute_capability']}, and the kernels are for {_CAPABILITY}"
        )
    if tuple(map(int, gpu["driver_cuda"].split("."))) < _DRIVER_CUDA:
        needed = ".".join(map(str, _DRIVER_CUDA))
        return f"the driver is for CUDA {gpu['driver_cuda']}, and nf needs one for {needed} or later"
    try:
        # What launches are linked against; the driver alone does not bring it.
        import_module("cuda.pathfinder").load_nvidia_dynamic_lib("cudart")
    except Exception as error:
        return f"the CUDA runtime library cannot be loaded ({str(error).partition('. ')[0]}; pip install 'nf[cuda]')"
    return None


def _gpu(driver: Any, device: Any, cuda: int) -> dict[str, Any]:
    attribute = driver.CUdevice_attribute

    def get(name: str) -> int:
        return int(_call(driver.cuDeviceGetAttribute, getattr(attribute, f"CU_DEVICE_ATTRIBUTE_{name}"), device))

    return {
        "name": _call(driver.cuDeviceGetName, 256, device).partition(b"\0")[0].decode(),
        "compute_capability": f"{get('COMPUTE_CAPABILITY_MAJOR')}.{get('COMPUTE_CAPABILITY_MINOR')}",
        "sms": get("MULTIPROCESSOR_COUNT"),
        "memory": int(_call(driver.cuDeviceTotalMem, device)),
        "driver_cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
    }


def _call(function: Any, *args: Any) -> Any:
    """A driver call: its result, or RuntimeError with the error's name."""
    error, *result = function(*args)
    if int(error) != 0:
        raise RuntimeError(getattr(error, "name", str(error)))
    return result[0] if result else None
