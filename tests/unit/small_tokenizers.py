"""Two small tokenizers of the kinds models have, as texts of tokenizer.json."""

from __future__ import annotations

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "def read_lines(path):\n    with open(path) as file:\n        return file.read().splitlines()\n",
    "The quick brown fox jumps over the lazy dog; the dog sleeps. Naïve café, Zürich, 2026.",
    "日本語のテキストと中文文本。 Привет, мир! 😀👩‍👩‍👧 مرحبا हिन्दी",
]


def byte_level() -> str:
    """Byte-level BPE in the manner of Llama 3 and Qwen; <user> and <think> are added, but not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>"])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("<user>", "<think>")])
    return str(tokenizer.to_str())


def sentencepiece() -> str:
    """BPE over "▁" with byte fallback in the manner of Llama 2: <s> before a text, its first space stripped."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.train_from_iterator(CORPUS[:2], trainers.BpeTrainer(vocab_size=150, show_progress=False))
    trained = json.loads(tokenizer.to_str())["model"]
    spellings = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    spellings += [text for text in sorted(trained["vocab"], key=trained["vocab"].get) if text != "\n"]
    vocab = {spelling: index for index, spelling in enumerate(spellings)}
    merges = [tuple(pair) for pair in trained["merges"] if "".join(pair) in vocab and set(pair) <= set(vocab)]
    tokenizer.model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return str(tokenizer.to_str())
