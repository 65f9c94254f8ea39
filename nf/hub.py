"""From a model's name to a directory: a path, the bundled model, or the Hugging Face hub's cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

from nf.errors import ModelError

BUNDLED_MODEL = "nf-tiny"
BUNDLED_DIR = Path(__file__).parent / "bundled" / BUNDLED_MODEL

# What nf reads of a repository. Sub-folders hold other formats; consolidated* repeats the weights in Mistral's own.
ALLOW_PATTERNS = ["*.safetensors", "*.json", "*.jinja"]
IGNORE_PATTERNS = ["*/*", "consolidated*"]
CONFIG_PATTERNS = ["config.json", "generation_config.json"]

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def resolve_model(name: str, *, config_only: bool = False) -> Path:
    """The directory of a model.

    Args:
        name: an existing directory, ``nf-tiny`` (the model that comes with nf), or ``org/name`` on the Hugging Face
            hub. The hub needs huggingface_hub, which honours HF_HOME, HF_HUB_OFFLINE and HF_TOKEN; only safetensors,
            JSON and template files are downloaded.
        config_only: download no more than says what shape the model has.

    Raises:
        ModelError: there is no such model, or it could not be downloaded.
    """
    path = os.path.expanduser(name)
    if os.path.isdir(path):  # os.path: unlike Path's, these are False for a name no file could have
        return Path(path)
    if name == BUNDLED_MODEL:
        return BUNDLED_DIR
    if os.path.exists(path):
        raise ModelError(name, "is a file; a model is a directory with config.json, tokenizer.json and safetensors")
    if not _HUB_NAME.fullmatch(name):
        raise ModelError(name or "model", f"is neither a directory, a hub name like org/name, nor {BUNDLED_MODEL!r}")
    return _download(name, CONFIG_PATTERNS if config_only else ALLOW_PATTERNS)


def _download(name: str, allow_patterns: list[str]) -> Path:
    try:
        import huggingface_hub
    except ImportError:
        raise ModelError(
            name, "is not a directory here; to take it from the Hugging Face hub, pip install 'nf[hub]'"
        ) from None
    try:
        return Path(
            huggingface_hub.snapshot_download(name, allow_patterns=allow_patterns, ignore_patterns=IGNORE_PATTERNS)
        )
    except Exception as error:  # network, token, disk, hub: the client's errors share no base class
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(name, f"could not be had from the Hugging Face hub: {reason}") from error
