"""The decoder layer of Llama and of every dense model built like it (Mistral, Qwen2, Qwen3).

These models differ in their weights alone: ``qkv_bias``, ``o_bias`` and ``qk_norm`` of the configuration add weights
to an operation, they change no operation. Sizes below: H hidden, I intermediate, V vocabulary, D head dimension.
"""

from __future__ import annotations

from nf.config import ModelConfig
from nf.models.declaration import GATE_UP_INTERLEAVE, Model, Weight
from nf.models.operations import Operation, Resource, Rows

EMBED = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
LAYER = "model.layers.{layer}."


def declare(config: ModelConfig) -> Model:
    """A dense decoder: attention followed by a SwiGLU feed-forward network."""
    return declare_decoder(config, dense_ffn_operations(), dense_ffn_weights(config))


def declare_decoder(
    config: ModelConfig, ffn_operations: tuple[Operation, ...], ffn_weights: tuple[Weight, ...]
) -> Model:
    """A decoder-only model whose layers are the usual attention and the given feed-forward part."""
    vocabulary = (config.vocab_size, config.hidden_size)
    return Model(
        config=config,
        operations=(*attention_operations(config), *ffn_operations),
        layer_weights=(*attention_weights(config), *ffn_weights),
        embed=whole("embed", EMBED, vocabulary),
        final_norm=whole("final_norm", "model.norm.weight", (config.hidden_size,)),
        lm_head=whole("lm_head", EMBED if config.tie_word_embeddings else LM_HEAD, vocabulary),
    )


def attention_operations(config: ModelConfig) -> tuple[Operation, ...]:
    """From the layer's input to the hidden state with attention added."""
    qkv = ("qkv_proj", "qkv_bias") if config.qkv_bias else ("qkv_proj",)
    o = ("o_proj", "o_bias") if config.o_bias else ("o_proj",)
    norms = ("q_norm", "k_norm") if config.qk_norm else ()
    return (
        Operation("attn_norm", Resource.MEMORY, ("hidden",), ("normed",), weights=("attn_norm",)),
        Operation("qkv_proj", Resource.COMPUTE, ("normed",), ("qkv",), weights=qkv),
        Operation("rope_append", Resource.MEMORY, ("qkv",), ("q", "kv"), weights=norms),
        Operation("decode_attention", Resource.MEMORY, ("q", "kv"), ("attn",), rows=Rows.DECODE),
        Operation(
            "prefill_attention", Resource.COMPUTE, ("q", "kv"), ("attn",), reads_before=("kv",), rows=Rows.PREFILL
        ),
        Operation("o_proj", Resource.COMPUTE, ("attn", "hidden"), ("hidden",), weights=o),
    )


def dense_ffn_operations() -> tuple[Operation, ...]:
    """SwiGLU: gate_up_proj's epilogue multiplies, so that [tokens, 2I] never reaches memory."""
    return (
        ffn_norm(),
        Operation("gate_up_proj", Resource.COMPUTE, ("normed",), ("activated",), weights=("gate_up_proj",)),
        Operation("down_proj", Resource.COMPUTE, ("activated", "hidden"), ("hidden",), weights=("down_proj",)),
    )


def ffn_norm() -> Operation:
    return Operation("ffn_norm", Resource.MEMORY, ("hidden",), ("normed",), weights=("ffn_norm",))


def attention_weights(config: ModelConfig) -> tuple[Weight, ...]:
    """Both norms of the layer and the projections of attention."""
    hidden, head_dim = config.hidden_size, config.head_dim
    q_size = config.num_heads * head_dim
    qkv_rows = (q_size, config.num_kv_heads * head_dim, config.num_kv_heads * head_dim)
    weights = [
        whole("attn_norm", LAYER + "input_layernorm.weight", (hidden,)),
        Weight("qkv_proj", (config.qkv_size, hidden), _qkv("weight"), qkv_rows),
        whole("o_proj", LAYER + "self_attn.o_proj.weight", (hidden, q_size)),
        whole("ffn_norm", LAYER + "post_attention_layernorm.weight", (hidden,)),
    ]
    if config.qkv_bias:
        weights.append(Weight("qkv_bias", (config.qkv_size,), _qkv("bias"), qkv_rows))
    if config.o_bias:
        weights.append(whole("o_bias", LAYER + "self_attn.o_proj.bias", (hidden,)))
    if config.qk_norm:
        weights.append(whole("q_norm", LAYER + "self_attn.q_norm.weight", (head_dim,)))
        weights.append(whole("k_norm", LAYER + "self_attn.k_norm.weight", (head_dim,)))
    return tuple(weights)


def dense_ffn_weights(config: ModelConfig) -> tuple[Weight, ...]:
    """gate_up_proj [2I, H], rows interleaved, and down_proj [H, I]."""
    hidden, inner = config.hidden_size, config.intermediate_size
    gate_up = (LAYER + "mlp.gate_proj.weight", LAYER + "mlp.up_proj.weight")
    return (
        Weight("gate_up_proj", (2 * inner, hidden), gate_up, (inner, inner), interleave=GATE_UP_INTERLEAVE),
        whole("down_proj", LAYER + "mlp.down_proj.weight", (hidden, inner)),
    )


def whole(name: str, tensor: str, shape: tuple[int, ...]) -> Weight:
    """A weight that is one checkpoint tensor."""
    return Weight(name, shape, (tensor,), (shape[0],))


def _qkv(kind: str) -> tuple[str, ...]:
    return tuple(f"{LAYER}self_attn.{part}_proj.{kind}" for part in "qkv")
