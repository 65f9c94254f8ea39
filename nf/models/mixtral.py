"""Mixtral: Llama's attention with a mixture of experts as its feed-forward part (arXiv 2401.04088, section 2.1).

A token is sent to ``experts_per_token`` of E experts, weighted by the softmax of its router logits over the chosen
ones. Sizes: H hidden, I intermediate.
"""

from __future__ import annotations

from nf.config import ModelConfig
from nf.models.declaration import GATE_UP_INTERLEAVE, Model, Weight
from nf.models.llama import LAYER, declare_decoder, ffn_norm, whole
from nf.models.operations import Operation, Resource

MOE = LAYER + "block_sparse_moe."
EXPERT = MOE + "experts.{expert}."


def declare(config: ModelConfig) -> Model:
    """A decoder whose feed-forward part is a router and stacked experts."""
    return declare_decoder(config, moe_operations(), moe_weights(config))


def moe_operations() -> tuple[Operation, ...]:
    """The router decides per token; both expert GEMMs read its decision."""
    compute = Resource.COMPUTE
    return (
        ffn_norm(),
        Operation("router", compute, ("normed",), ("routing",), weights=("router",)),
        Operation("moe_gate_up_proj", compute, ("normed", "routing"), ("activated",), weights=("moe_gate_up_proj",)),
        Operation(
            "moe_down_proj", compute, ("activated", "routing", "hidden"), ("hidden",), weights=("moe_down_proj",)
        ),
    )


def moe_weights(config: ModelConfig) -> tuple[Weight, ...]:
    """router [E, H], moe_gate_up_proj [E, 2I, H] with interleaved rows, moe_down_proj [E, H, I]."""
    experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
    gate_up = (EXPERT + "w1.weight", EXPERT + "w3.weight")
    return (
        whole("router", MOE + "gate.weight", (experts, hidden)),
        Weight(
            "moe_gate_up_proj", (experts, 2 * inner, hidden), gate_up, (inner, inner), interleave=GATE_UP_INTERLEAVE
        ),
        Weight("moe_down_proj", (experts, hidden, inner), (EXPERT + "w2.weight",), (hidden,)),
    )
