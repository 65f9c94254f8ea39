"""NanoFlow's ideas as an LLM inference engine. Public names are imported when first used, so ``import nf`` is light."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nf.errors import EngineError, InputError, ModelError, PlanError
    from nf.llm import LLM, AsyncLLM
    from nf.outputs import CompletionOutput, Logprob, RequestOutput
    from nf.sampling_params import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "EngineError",
    "InputError",
    "Logprob",
    "ModelError",
    "PlanError",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]

_MODULES = {
    "LLM": "nf.llm",
    "AsyncLLM": "nf.llm",
    "CompletionOutput": "nf.outputs",
    "EngineError": "nf.errors",
    "InputError": "nf.errors",
    "Logprob": "nf.outputs",
    "ModelError": "nf.errors",
    "PlanError": "nf.errors",
    "RequestOutput": "nf.outputs",
    "SamplingParams": "nf.sampling_params",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'nf' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
