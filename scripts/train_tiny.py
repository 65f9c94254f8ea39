"""Train nf-tiny, the model bundled with nf: a small Llama on Python's standard library and documentation.

Needs torch, tokenizers, safetensors and NumPy; runs on one GPU (minutes) or on a CPU (for a look at it).

    python scripts/train_tiny.py --out nf/bundled/nf-tiny \\
        --text "$(python -c 'import os; print(os.path.dirname(os.__file__))')" \\
        --text /usr/share/doc/python3.11/html/_sources     # Debian's package python3.11-doc; or CPython's Doc folder

What is cut from --text is kept, tokenized, in --cache: a later run, on another machine too, needs only that folder.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import save_file
from tiny.card import Report, write_card
from tiny.corpus import read_corpus
from tiny.model import Llama, Shape, continue_greedily
from tiny.tokenizer import BOS, EOS, KINDS, TokenizedCorpus, tokenize, train_tokenizer, write_tokenizer
from tokenizers import Tokenizer

WARMUP_STEPS = 200
PADDING = 64  # rows of a batch are as long as its longest document, rounded up to this
IGNORED = -100  # cross_entropy's mark for targets that do not count
SAMPLING_DEFAULTS = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1}  # small models like to repeat
SAMPLED_PROMPTS = (
    "def read_lines(path):",
    "class Stack:",
    "The with statement",
    "<|user|>What does os.path.join do?<|assistant|>",
    "<|user|>How do I use textwrap.dedent?<|assistant|>",
    "<|user|>What is a generator?<|assistant|>",
)


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    shape = Shape()
    if args.text:
        prepare(args.text, args.cache, shape, args.seed)
    corpus = TokenizedCorpus.load(args.cache / "corpus.npz")
    tokenizer = Tokenizer.from_file(str(args.cache / "tokenizer.json"))
    model = Llama(shape, args.dropout).to(args.device)
    report = train(model, corpus, args)
    export(model, args.cache, args.out, report)
    print_samples(model, tokenizer)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="model directory to write")
    parser.add_argument("--text", type=Path, action="append", help="folder of *.py or *.rst files; may be repeated")
    parser.add_argument(
        "--cache", type=Path, default=Path(".data/nf-tiny"), help="tokenized corpus (default: %(default)s)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=1600, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=65536, help="tokens per step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=6e-3, help="at its peak (default: %(default)s)")
    parser.add_argument("--weight-decay", type=float, default=0.5, help="of matrices (default: %(default)s)")
    parser.add_argument("--dropout", type=float, default=0.0, help="of each block's output (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


# Corpus


def prepare(folders: list[Path], cache: Path, shape: Shape, seed: int) -> None:
    """Cut documents out of ``folders``, train the tokenizer on those not held out and keep both in ``cache``."""
    documents = read_corpus(folders, seed)
    learned = (text for document in documents if not document.held_out for _, text in document.turns)
    tokenizer = train_tokenizer(learned, shape.vocab_size)
    corpus = tokenize(documents, tokenizer, shape.max_position_embeddings)
    cache.mkdir(parents=True, exist_ok=True)
    write_tokenizer(tokenizer, cache, shape.max_position_embeddings)
    corpus.save(cache / "corpus.npz")
    for folder in folders:
        if (folder / "LICENSE.txt").is_file():
            shutil.copyfile(folder / "LICENSE.txt", cache / "LICENSE-PSF.txt")
    print(f"{len(corpus.kinds)} documents, {len(corpus.tokens)} tokens, longest {corpus.lengths.max()}")


def batches(
    corpus: TokenizedCorpus, chosen: np.ndarray, batch_tokens: int, random: np.random.Generator
) -> Iterator[np.ndarray]:
    """One epoch over the documents ``chosen``, as document numbers of similar length, in random order.

    Rows of one batch are padded to its longest, so documents neither share a row nor see each other.
    """
    jitter = random.uniform(0.9, 1.1, len(chosen))  # other neighbours in each epoch
    ordered = chosen[np.argsort(corpus.lengths[chosen] * jitter)]
    found: list[np.ndarray] = []
    start = longest = 0
    for at, length in enumerate(corpus.lengths[ordered]):
        longest = max(longest, length)
        if (at - start + 1) * longest > batch_tokens:
            found.append(ordered[start:at])
            start, longest = at, length
    found.append(ordered[start:])
    for number in random.permutation(len(found)):
        yield found[number]


def gather(corpus: TokenizedCorpus, tokens: torch.Tensor, documents: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, int64 [documents, longest]; targets past a document's end are IGNORED."""
    lengths = corpus.lengths[documents]
    width = math.ceil((lengths.max() - 1) / PADDING) * PADDING
    columns = np.arange(width + 1)
    inside = torch.from_numpy(columns < lengths[:, None]).to(tokens.device)
    where = np.minimum(corpus.starts[documents][:, None] + columns, len(corpus.tokens) - 1)
    rows = tokens[torch.from_numpy(where).to(tokens.device)]
    return rows[:, :-1].contiguous(), rows.masked_fill(~inside, IGNORED)[:, 1:].contiguous()


# Training


def train(model: Llama, corpus: TokenizedCorpus, args: argparse.Namespace) -> Report:
    """AdamW with warm-up and a cosine to zero; prints losses ten times, and rounds the weights to bf16 at the end."""
    tokens = torch.from_numpy(corpus.tokens.astype(np.int64)).to(args.device)
    random = np.random.default_rng(args.seed)
    optimizer = make_optimizer(model, args)
    held_out, learned = np.flatnonzero(corpus.held_out), np.flatnonzero(~corpus.held_out)
    epoch: Iterator[np.ndarray] = iter(())
    tokens_seen = 0
    started = time.perf_counter()
    for step in range(1, args.steps + 1):
        documents = next(epoch, None)
        if documents is None:
            epoch = batches(corpus, learned, args.batch_tokens, random)
            documents = next(epoch)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * schedule(step, args.steps)
        losses, count = token_losses(model, *gather(corpus, tokens, documents))
        loss = losses.sum() / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens_seen += int(corpus.lengths[documents].sum())
        if step % max(args.steps // 10, 1) == 0:
            measured = bits_per_byte(model, corpus, tokens, held_out, args.batch_tokens)
            rate = tokens_seen / (time.perf_counter() - started)
            print(f"step {step} loss {loss.item():.3f} held-out {show(measured)} ({rate:,.0f} tokens/s)", flush=True)
    seconds = time.perf_counter() - started
    model.bfloat16().float()  # from here on the weights are those that are written
    again = random.choice(learned, min(len(learned), len(held_out)), replace=False)
    return Report(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        corpus_tokens=int(corpus.lengths[learned].sum()),
        tokens_seen=tokens_seen,
        learned=show(bits_per_byte(model, corpus, tokens, again, args.batch_tokens)),
        held_out=show(bits_per_byte(model, corpus, tokens, held_out, args.batch_tokens)),
        seconds=seconds,
        settings={name: value for name, value in vars(args).items() if name not in ("out", "text", "cache")},
    )


def make_optimizer(model: Llama, args: argparse.Namespace) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    scales = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": scales, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=args.device == "cuda")


def schedule(step: int, steps: int) -> float:
    """Fraction of the peak learning rate."""
    return min(step / WARMUP_STEPS, 1.0) * 0.5 * (1 + math.cos(math.pi * step / steps))


def token_losses(model: Llama, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats per target, fp32 [documents, width], 0 where ignored, and the number of targets that count."""
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=inputs.is_cuda):
        logits = model(inputs)
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(targets), (targets != IGNORED).sum()


# Evaluation


@torch.no_grad()
def bits_per_byte(
    model: Llama, corpus: TokenizedCorpus, tokens: torch.Tensor, chosen: np.ndarray, batch_tokens: int
) -> dict[str, float]:
    """Bits the model needs per byte of text in the documents ``chosen``, by kind and over all."""
    model.eval()
    nats = np.zeros(len(corpus.kinds))
    for documents in batches(corpus, chosen, batch_tokens, np.random.default_rng(0)):
        losses, _ = token_losses(model, *gather(corpus, tokens, documents))
        nats[documents] = losses.sum(1).double().cpu()
    model.train()
    by_kind = {kind: chosen[corpus.kinds[chosen] == number] for number, kind in enumerate(KINDS)}
    return {
        kind: float(nats[of_kind].sum() / math.log(2) / corpus.text_bytes[of_kind].sum())
        for kind, of_kind in (by_kind | {"all": chosen}).items()
        if len(of_kind)
    }


def show(measured: dict[str, float]) -> str:
    return ", ".join(f"{kind} {bits:.2f}" for kind, bits in measured.items()) + " bits/byte"


def print_samples(model: Llama, tokenizer: Tokenizer) -> None:
    """Greedy continuations of SAMPLED_PROMPTS."""
    model.eval()
    for prompt in SAMPLED_PROMPTS:
        written = continue_greedily(model, tokenizer.encode(prompt).ids, tokenizer.token_to_id(EOS), most=150)
        print(f"----- {prompt}\n{tokenizer.decode(written)}", flush=True)


# Export


def export(model: Llama, cache: Path, out: Path, report: Report) -> None:
    """The Hugging Face model directory: bf16 weights (the tied output matrix once), configs, tokenizer and card."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(cache / "tokenizer.json"))
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    weights = {name: value.detach().bfloat16().contiguous().cpu() for name, value in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(model.shape),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    sampling = {"bos_token_id": bos, "eos_token_id": eos, "do_sample": True, **SAMPLING_DEFAULTS}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (out / "generation_config.json").write_text(json.dumps(sampling, indent=2) + "\n", encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE-PSF.txt"):
        if (cache / name).is_file():
            shutil.copyfile(cache / name, out / name)
    write_card(out / "README.md", report)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {size / 1e6:.2f} MB, {report.parameters:,} parameters")


if __name__ == "__main__":
    main()
