"""Models, batches and a plain reference for tests of executors: dense attention in float64, no pages, no plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Protocol

import numpy as np

from nf.config import ModelConfig, RopeConfig
from nf.graphs.plan import NanoOperation, PipelinePlan, Stream
from nf.models.declaration import Model, ModelWeights
from nf.models.registry import declare
from nf.scheduler.batch import Batch, PromptLogprobsBatch, SamplingBatch

NO_IDS = np.zeros(0, np.int32)
NO_PAIRS = np.zeros((0, 2), np.int32)


def small_model(**changes) -> Model:
    sizes = {
        "architecture": "LlamaForCausalLM",
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
    }
    return declare(ModelConfig(**(sizes | changes)))


def random_weights(model: Model, seed: int) -> ModelWeights:
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return rng.uniform(0.5, 1.5, shape).astype(np.float32)
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    embed = draw(model.embed.shape)
    lm_head = embed if model.config.tie_word_embeddings else draw(model.lm_head.shape)
    layers = tuple({w.name: draw(w.shape) for w in model.layer_weights} for _ in range(model.config.num_layers))
    return ModelWeights(embed, draw(model.final_norm.shape), lm_head, layers)


def random_plan(
    model: Model, dense_batch_size: int, random: Random, alike: dict[str, str] | None = None
) -> PipelinePlan:
    """One stream; each operation cut at its own random places, nano-operations of an operation in random order.

    ``alike`` maps operations to earlier ones that they are cut like.
    """
    ranges: list[tuple[int, int]] = []
    items = []
    cuts_of: dict[str, list[int]] = {}
    for operation in model.operations:
        count = random.randint(0, min(3, dense_batch_size - 1))
        drawn = sorted(random.sample(range(1, dense_batch_size), count))
        cuts = cuts_of.get((alike or {}).get(operation.name, ""), drawn)
        cuts_of[operation.name] = cuts
        own = list(zip([0, *cuts], [*cuts, dense_batch_size], strict=True))
        random.shuffle(own)
        for part in own:
            if part not in ranges:
                ranges.append(part)
            items.append(NanoOperation(operation.name, ranges.index(part)))
    return PipelinePlan("random", dense_batch_size, tuple(ranges), (Stream("all", tuple(items)),))


def sampling_batch(rows: list[int], slots: list[int], positions: list[int], **columns) -> SamplingBatch:
    """Greedy unless ``columns`` say otherwise; lists per row as bias=[{id: value}], allowed=[[id]], words=[[[id]]]."""
    count = len(rows)
    defaults = {
        "prompt_lens": np.zeros(count, np.int32),
        "temperature": np.zeros(count, np.float32),
        "top_k": np.zeros(count, np.int32),
        "top_p": np.ones(count, np.float32),
        "min_p": np.zeros(count, np.float32),
        "presence_penalty": np.zeros(count, np.float32),
        "frequency_penalty": np.zeros(count, np.float32),
        "repetition_penalty": np.ones(count, np.float32),
        "seeds": np.arange(count, dtype=np.uint64),
        "sample_index": np.zeros(count, np.int32),
        "logprobs": np.full(count, -1, np.int32),
    }
    bias = columns.pop("bias", [{}] * count)
    allowed = columns.pop("allowed", [[]] * count)
    words = columns.pop("words", [[]] * count)
    for name, values in columns.items():
        defaults[name] = np.broadcast_to(np.asarray(values, defaults[name].dtype), (count,)).copy()
    return SamplingBatch(
        rows=np.array(rows, np.int32),
        slots=np.array(slots, np.int32),
        positions=np.array(positions, np.int32),
        **defaults,
        bias_indptr=indptr([len(b) for b in bias]),
        bias_ids=np.array([i for b in bias for i in b], np.int32),
        bias_values=np.array([v for b in bias for v in b.values()], np.float32),
        allowed_indptr=indptr([len(a) for a in allowed]),
        allowed_ids=np.array([i for a in allowed for i in a], np.int32),
        bad_words_indptr=indptr([len(w) for w in words]),
        bad_words_token_indptr=indptr([len(word) for w in words for word in w]),
        bad_words_ids=np.array([i for w in words for word in w for i in word], np.int32),
    )


def indptr(counts: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


@dataclass
class Part:
    """What a step computes of one sequence: ``count`` tokens from position ``start`` on."""

    slot: int
    start: int
    token_ids: list[int]  # -1: in the token buffer
    decode: bool = False


@dataclass
class BatchMaker:
    """Gives every slot its own random pages and turns parts into batches."""

    page_size: int
    num_pages: int
    pages_per_slot: int
    rng: np.random.Generator
    step: int = 0
    tables: dict[int, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.free = list(self.rng.permutation(self.num_pages))

    def table(self, slot: int) -> np.ndarray:
        if slot not in self.tables:
            self.tables[slot] = np.array([self.free.pop() for _ in range(self.pages_per_slot)], np.int32)
        return self.tables[slot]

    def batch(self, parts: list[Part], sampling: SamplingBatch | None = None, **changes) -> Batch:
        """Decoding parts first; samples the last row of every part, greedily, unless told otherwise."""
        parts = sorted(parts, key=lambda part: not part.decode)
        counts = [len(part.token_ids) for part in parts]
        slots = np.array([part.slot for part in parts], np.int32)
        kv_lens = np.array([part.start + len(part.token_ids) for part in parts], np.int32)
        tables = [self.table(p.slot)[: -(-int(n) // self.page_size)] for p, n in zip(parts, kv_lens, strict=True)]
        qo_indptr = indptr(counts)
        if sampling is None:
            sampling = sampling_batch((qo_indptr[1:] - 1).tolist(), slots.tolist(), kv_lens.tolist())
        self.step += 1
        fields = {
            "step": self.step,
            "num_decode": sum(part.decode for part in parts),
            "token_ids": np.array([t for part in parts for t in part.token_ids], np.int32),
            "token_slots": np.repeat(slots, counts),
            "positions": np.array([p.start + i for p in parts for i in range(len(p.token_ids))], np.int32),
            "slots": slots,
            "qo_indptr": qo_indptr,
            "kv_lens": kv_lens,
            "kv_indptr": indptr([len(t) for t in tables]),
            "kv_indices": np.concatenate([*tables, NO_IDS]).astype(np.int32),
            "last_page_len": ((kv_lens - 1) % self.page_size + 1).astype(np.int32),
            "sampling": sampling,
            "prompt_logprobs": PromptLogprobsBatch(NO_IDS, NO_IDS, NO_IDS, NO_IDS),
            "swap_out": NO_PAIRS,
            "swap_in": NO_PAIRS,
            "page_copies": NO_PAIRS,
            "forks": np.zeros((0, 3), np.int32),
        }
        return Batch(**(fields | changes))


def random_steps(sequences: dict[int, list[int]], dense_batch_size: int, rng: np.random.Generator) -> list[list[Part]]:
    """Cut token lists into steps: random chunks, in each sequence one after another, some single tokens as decode."""
    done = dict.fromkeys(sequences, 0)
    steps = []
    while any(done[s] < len(sequences[s]) for s in sequences):
        room, parts = dense_batch_size, []
        for slot in rng.permutation(list(sequences)):
            slot = int(slot)
            left = len(sequences[slot]) - done[slot]
            if not left or not room or rng.random() < 0.25:
                continue
            count = 1 if rng.random() < 0.4 else int(rng.integers(1, min(left, room) + 1))
            start = done[slot]
            decode = count == 1 and start > 0 and rng.random() < 0.8
            parts.append(Part(slot, start, sequences[slot][start : start + count], decode))
            done[slot] += count
            room -= count
        if parts:
            steps.append(parts)
    return steps


def all_logits(
    run: RunsLogits, batches: BatchMaker, sequences: dict[int, list[int]], dense_batch_size: int, seed: int
) -> dict[int, np.ndarray]:
    """Logits of every position of every sequence, run through random steps."""
    parts_of: dict[int, list[np.ndarray]] = {slot: [] for slot in sequences}
    for parts in random_steps(sequences, dense_batch_size, np.random.default_rng(seed)):
        batch = batches.batch(parts)
        logits = run.logits(batch, np.arange(batch.num_tokens, dtype=np.int32))
        for slot, start, stop in zip(batch.slots, batch.qo_indptr[:-1], batch.qo_indptr[1:], strict=True):
            parts_of[int(slot)].append(logits[start:stop])
    return {slot: np.concatenate(parts) for slot, parts in parts_of.items()}


class RunsLogits(Protocol):
    """An executor that shows logits."""

    def logits(self, batch: Batch, rows: np.ndarray) -> np.ndarray: ...


# The reference: one sequence, every position at once, float64.


def reference_logits(model: Model, weights: ModelWeights, token_ids: list[int], watch_router=None) -> np.ndarray:
    """Logits of every position, float64 [tokens, vocab_size]; ``watch_router`` sees what every router does."""
    config = model.config
    x = weights.embed.astype(np.float64)[token_ids]
    for layer in weights.layers:
        w = {name: array.astype(np.float64) for name, array in layer.items()}
        x = x + _attention(config, w, _norm(x, w["attn_norm"], config.rms_norm_eps))
        normed = _norm(x, w["ffn_norm"], config.rms_norm_eps)
        if config.num_experts and watch_router:
            watch_router(config, w, normed)
        x = x + (_experts(config, w, normed) if config.num_experts else _ffn(w["gate_up_proj"], w["down_proj"], normed))
    final = _norm(x, weights.final_norm.astype(np.float64), config.rms_norm_eps)
    return final @ weights.lm_head.astype(np.float64).T


def closest_call(model: Model, weights: ModelWeights, token_ids: list[int]) -> float:
    """The least difference of router logits that decides between two experts; where it is tiny, float32 may differ."""
    margins = [np.inf]

    def watch(config: ModelConfig, w: dict[str, np.ndarray], x: np.ndarray) -> None:
        logits = np.sort(x @ w["router"].T, axis=-1)[:, ::-1]
        if config.experts_per_token < config.num_experts:
            chosen = logits[:, config.experts_per_token - 1]
            margins.append((chosen - logits[:, config.experts_per_token]).min())

    reference_logits(model, weights, token_ids, watch)
    return float(min(margins))


def _norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def _attention(config: ModelConfig, w: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    tokens, heads, kv_heads, dim = len(x), config.num_heads, config.num_kv_heads, config.head_dim
    qkv = x @ w["qkv_proj"].T + w.get("qkv_bias", 0.0)
    q, k, v = np.split(qkv, [heads * dim, (heads + kv_heads) * dim], axis=1)
    q, k, v = (part.reshape(tokens, -1, dim) for part in (q, k, v))
    if config.qk_norm:
        q = _norm(q, w["q_norm"], config.rms_norm_eps)
        k = _norm(k, w["k_norm"], config.rms_norm_eps)
    q, k = _rotate(config.rope, q), _rotate(config.rope, k)
    result = np.zeros((tokens, heads, dim))
    for head in range(heads):
        kv_head = head // (heads // kv_heads)
        for t in range(tokens):
            first = 0 if config.sliding_window is None else max(0, t + 1 - config.sliding_window)
            scores = k[first : t + 1, kv_head] @ q[t, head] / np.sqrt(dim)
            p = np.exp(scores - scores.max())
            result[t, head] = p @ v[first : t + 1, kv_head] / p.sum()
    return result.reshape(tokens, -1) @ w["o_proj"].T + w.get("o_bias", 0.0)


def _rotate(rope: RopeConfig, x: np.ndarray) -> np.ndarray:
    """Each pair (i, i + half) is a complex number, turned by position · frequency."""
    half = x.shape[-1] // 2
    frequencies = np.array([_frequency(rope, rope.theta ** (-i / half)) for i in range(half)])
    turn = np.exp(1j * np.arange(len(x))[:, None] * frequencies)[:, None, :]
    turned = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([turned.real, turned.imag], axis=-1)


def _frequency(rope: RopeConfig, frequency: float) -> float:
    if rope.kind == "default":
        return frequency
    if rope.kind == "linear":
        return frequency / rope.factor
    turns = rope.original_max_position_embeddings * frequency / (2 * np.pi)  # within the original context
    if turns < rope.low_freq_factor:
        return frequency / rope.factor
    if turns > rope.high_freq_factor:
        return frequency
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return (1 - kept) * frequency / rope.factor + kept * frequency


def _ffn(gate_up: np.ndarray, down: np.ndarray, x: np.ndarray) -> np.ndarray:
    rows = np.arange(len(gate_up))
    is_up = rows // 8 % 2 == 1  # blocks of 8 rows alternate
    gate, up = x @ gate_up[~is_up].T, x @ gate_up[is_up].T
    return (gate / (1 + np.exp(-gate)) * up) @ down.T


def _experts(config: ModelConfig, w: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    result = np.zeros_like(x)
    for t in range(len(x)):
        logits = w["router"] @ x[t]
        p = np.exp(logits) / np.exp(logits).sum()
        ranked = sorted(range(config.num_experts), key=lambda e: -p[e])
        best = ranked[: config.experts_per_token]
        for e in best:
            share = p[e] / sum(p[b] for b in best)
            result[t] += share * _ffn(w["moe_gate_up_proj"][e], w["moe_down_proj"][e], x[t : t + 1])[0]
    return result
