"""The byte-level BPE tokenizer of nf-tiny and its chat template, and documents as token ids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tiny.corpus import Document

BOS, EOS, SYSTEM, USER, ASSISTANT = SPECIALS = ("<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>")
KINDS = ("code", "prose", "chat")

# A newline never joins the text before it and indentation never joins the newline, so that a prompt that stops at
# "):" or at a line's end is cut exactly where the training text was.
WORDS = r" ?_*\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|[\r\n]+|[^\S\r\n]+(?!\S)|\s+"

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>' + message['content'] -}}
{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE over ``texts``; ids 0 … 4 are the special tokens, and encoding puts <|bos|> first."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    special = [(BOS, tokenizer.token_to_id(BOS))]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=special
    )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """tokenizer.json without white space, tokenizer_config.json and chat_template.jinja."""
    compact = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(compact + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT],
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


@dataclass(frozen=True, slots=True)
class TokenizedCorpus:
    """Documents one after the other.

    tokens: uint16 [total]; starts: int64 [documents + 1]; kinds: uint8 [documents], index in KINDS;
    held_out: bool [documents]; text_bytes: int32 [documents], UTF-8 size of the text without special tokens.
    """

    tokens: np.ndarray
    starts: np.ndarray
    kinds: np.ndarray
    held_out: np.ndarray
    text_bytes: np.ndarray

    @classmethod
    def load(cls, path: Path) -> TokenizedCorpus:
        with np.load(path, allow_pickle=False) as arrays:
            return cls(*(arrays[name] for name in cls.__slots__))

    def save(self, path: Path) -> None:
        np.savez_compressed(path, **{name: getattr(self, name) for name in self.__slots__})

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per document, int64 [documents]."""
        return np.diff(self.starts)


def tokenize(documents: Sequence[Document], tokenizer: Tokenizer, max_length: int) -> TokenizedCorpus:
    """Documents as token ids; those longer than ``max_length`` are left out."""
    texts = [text for document in documents for _, text in document.turns]
    encoded = iter(tokenizer.encode_batch(texts, add_special_tokens=False))
    rows = [(document, _token_ids(document, tokenizer, encoded)) for document in documents]
    rows = [(document, ids) for document, ids in rows if len(ids) <= max_length]
    return TokenizedCorpus(
        tokens=np.concatenate([np.array(ids, dtype=np.uint16) for _, ids in rows]),
        starts=np.cumsum([0, *(len(ids) for _, ids in rows)]),
        kinds=np.array([KINDS.index(document.kind) for document, _ in rows], dtype=np.uint8),
        held_out=np.array([document.held_out for document, _ in rows]),
        text_bytes=np.array([sum(len(text.encode()) for _, text in doc.turns) for doc, _ in rows], dtype=np.int32),
    )


def _token_ids(document: Document, tokenizer: Tokenizer, encoded: Iterable) -> list[int]:
    """What the chat template writes for a conversation, and <|bos|> text <|eos|> for plain text."""
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    ids = [bos]
    for (role, _), text in zip(document.turns, encoded, strict=False):
        ids += [tokenizer.token_to_id(f"<|{role}|>"), *text.ids] if role else text.ids
        if role in ("assistant", ""):
            ids.append(eos)
    return ids
