"""How many bytes of text one token can stand for at most, from what tokenizer.json says."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

NO_BOUND = sys.maxsize
# Composing shrinks UTF-8 at most 3.5 times: U+1FBE U+0308 U+0301, 7 bytes, make U+0390, 2 bytes.
NORMALIZER_SHRINKS = {"Prepend": 1, "Replace": 1, "ByteLevel": 1, "NFC": 4}
PRE_TOKENIZERS = {"ByteLevel", "Metaspace", "Split", "Digits", "Punctuation"}
BYTES = 256


def max_token_bytes(spec: Mapping[str, Any]) -> int:
    """A number such that a text of B bytes has at least B / number tokens; ``NO_BOUND`` if none is known to hold.

    It holds where every byte of the text is in some token and tokens stand for no more than their own spelling: BPE
    over all bytes, no step that drops text. Whatever is not known to be so has no bound.

    Args:
        spec: tokenizer.json.
    """
    model, tokens = spec["model"], spec.get("added_tokens") or []
    shrink = 1
    for step in _steps(spec.get("normalizer"), "normalizers"):
        kind = step["type"]
        if kind not in NORMALIZER_SHRINKS or (kind == "Replace" and not _grows(step)):
            return NO_BOUND
        shrink *= NORMALIZER_SHRINKS[kind]
    steps = list(_steps(spec.get("pre_tokenizer"), "pretokenizers"))
    if any(step["type"] not in PRE_TOKENIZERS or step.get("behavior") == "Removed" for step in steps):
        return NO_BOUND
    if any(token.get("lstrip") or token.get("rstrip") for token in tokens):  # such a token swallows spaces
        return NO_BOUND
    if model.get("type") != "BPE" or not _covers_bytes(spec, model):
        return NO_BOUND
    spellings = [*model["vocab"], *(token["content"] for token in tokens)]
    return shrink * max(len(spelling.encode()) for spelling in spellings)


def _steps(step: Mapping[str, Any] | None, inner: str) -> Iterator[Mapping[str, Any]]:
    if step is not None and step["type"] == "Sequence":
        for part in step[inner]:
            yield from _steps(part, inner)
    elif step is not None:
        yield step


def _grows(step: Mapping[str, Any]) -> bool:
    pattern = step["pattern"].get("String")
    return pattern is not None and len(step["content"].encode()) >= len(pattern.encode())


def _covers_bytes(spec: Mapping[str, Any], model: Mapping[str, Any]) -> bool:
    """Whether any byte can be spelled: else what is unknown is dropped or becomes one token of any length."""
    if model.get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(BYTES))
    steps = [*_steps(spec.get("normalizer"), "normalizers"), *_steps(spec.get("pre_tokenizer"), "pretokenizers")]
    singles = sum(len(spelling) == 1 for spelling in model["vocab"])
    return any(step["type"] == "ByteLevel" for step in steps) and singles >= BYTES
