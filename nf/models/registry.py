"""Which declaration belongs to which architecture name of config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from nf.config import ModelConfig
from nf.errors import ModelError
from nf.models import llama, mixtral
from nf.models.declaration import Model

DECLARATIONS: Mapping[str, Callable[[ModelConfig], Model]] = MappingProxyType(
    {
        "LlamaForCausalLM": llama.declare,
        "MistralForCausalLM": llama.declare,
        "Qwen2ForCausalLM": llama.declare,
        "Qwen3ForCausalLM": llama.declare,
        "MixtralForCausalLM": mixtral.declare,
    }
)


def declare(config: ModelConfig) -> Model:
    """The model that ``config`` describes.

    Raises:
        ModelError: the architecture is not one of ``DECLARATIONS``.
    """
    try:
        build = DECLARATIONS[config.architecture]
    except KeyError:
        known = ", ".join(DECLARATIONS)
        raise ModelError("architectures", f"{config.architecture!r} is not supported; {known} are") from None
    return build(config)
