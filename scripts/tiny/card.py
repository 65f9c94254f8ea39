"""The model card of nf-tiny: what it is, what it was made from, and what was measured."""

from __future__ import annotations

import datetime
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch

CARD = """\
# nf-tiny

The model bundled with nf, so that `nf generate` works at once on any machine: a Llama of {parameters:,} parameters
(bf16) with its own byte-level BPE tokenizer of 4,096 tokens and a context of 1,024 tokens. It writes text that *reads
like* Python's standard library and its documentation: code, prose, and answers to questions such as "What does
os.path.join do?". It is a demonstration and a test piece: what it says is often wrong.

## How it was made

`scripts/train_tiny.py` made everything in this folder. The text is the source of Python's standard library (CPython
3.11, without its tests) and its documentation, cut into short whole documents: functions and classes, sections and
reference entries, and questions made from headings, names and signatures, answered by the documentation. The modules
that PEP 594 removed from Python were held out to measure the loss.

| | |
|---|---|
| architecture | LlamaForCausalLM, 6 layers, hidden 256, 4 heads and 2 KV heads of 64, FFN 768, tied embeddings |
| text | {corpus_tokens:,} tokens after the hold-out |
| training | {tokens_seen:,} tokens seen ({epochs:.0f} epochs) in {seconds:.0f} s; {settings} |
| loss on training text | {learned} |
| loss on held-out text | {held_out} |
| date, hardware | {date}, {hardware} |
| versions | {versions} |

## Use

`<|bos|>` opens every text and `<|eos|>` ends it; `<|system|>`, `<|user|>` and `<|assistant|>` open the turns of a
conversation (`chat_template.jinja`). `generation_config.json` recommends how to sample.

## Licence

The weights and the tokenizer are under Apache-2.0, as the project. The text they were trained on is Copyright ©
Python Software Foundation and is used under the PSF License Agreement, which is beside this file as
`LICENSE-PSF.txt`; the model can repeat passages of it word for word.
"""


@dataclass(slots=True)
class Report:
    """What a training run measured; losses are of the weights as written (bf16)."""

    parameters: int
    corpus_tokens: int
    tokens_seen: int
    learned: str
    held_out: str
    seconds: float
    settings: dict[str, object]


def write_card(path: Path, report: Report) -> None:
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    versions = {"Python": platform.python_version(), "torch": torch.__version__, "NumPy": np.__version__}
    versions["tokenizers"] = tokenizers.__version__
    text = CARD.format(
        parameters=report.parameters,
        corpus_tokens=report.corpus_tokens,
        tokens_seen=report.tokens_seen,
        epochs=report.tokens_seen / report.corpus_tokens,
        learned=report.learned,
        held_out=report.held_out,
        seconds=report.seconds,
        settings=", ".join(f"{name.replace('_', ' ')} {value}" for name, value in report.settings.items()),
        date=datetime.date.today().isoformat(),
        hardware=hardware,
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
    )
    path.write_text(text, encoding="utf-8")
