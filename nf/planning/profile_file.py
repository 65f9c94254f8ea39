"""Profiles on disk: one small JSON file per GPU, driver and kernels, with every model that was measured there."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nf.errors import InputError, shown
from nf.files import write_whole
from nf.planning.profile import Profile, ProfileKey

FORMAT_VERSION = 1


def read_profile(path: Path, model: str) -> Profile:
    """The measurements of ``model`` in a profile file, whatever they were made with.

    Raises:
        InputError: there is no such file, ``save_profile`` did not write it, or it has none of ``model``.
    """
    document = _document(path)
    if document is None:
        raise InputError(str(path), "there is no such profile file")
    models = document["models"]
    if model not in models:
        raise InputError(str(path), f"has no measurements of {model}, only of {', '.join(models) or 'nothing'}")
    return _profile(path, _key_of(document), model, models[model])


def load_profile(folder: Path, key: ProfileKey, model: str) -> Profile | None:
    """The stored measurements of ``model``, None where there are none.

    Raises:
        InputError: the file is not one that ``save_profile`` wrote.
    """
    path = folder / key.file_name
    models = _models(path, key)
    return _profile(path, key, model, models[model]) if model in models else None


def save_profile(folder: Path, profile: Profile) -> Path:
    """Write ``profile`` into the file of its key beside the other models there, whole or not at all."""
    path = folder / profile.key.file_name
    models = _models(path, profile.key)
    models[profile.model] = profile.to_json()
    head = {"version": FORMAT_VERSION, "gpu": profile.key.gpu, "driver": profile.key.driver}
    document = head | {"kernels": profile.key.kernels, "models": models}
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, _compact(document))
    return path


def _document(path: Path) -> dict[str, Any] | None:
    """A profile file, None if there is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["version"] != FORMAT_VERSION:
            raise InputError(str(path), f"format {shown(document['version'])} is unknown; it must be {FORMAT_VERSION}")
        _key_of(document)
        return {**document, "models": dict(document["models"])}
    except FileNotFoundError:
        return None
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(str(path), f"cannot be read as a profile ({error})") from None


def _key_of(document: Mapping[str, Any]) -> ProfileKey:
    return ProfileKey(document["gpu"], document["driver"], document["kernels"])


def _models(path: Path, key: ProfileKey) -> dict[str, Any]:
    """Models of a profile file that must be of ``key``."""
    document = _document(path)
    if document is None:
        return {}
    if _key_of(document) != key:
        raise InputError(str(path), "the profile was measured with another GPU, driver or kernel version")
    models: dict[str, Any] = document["models"]
    return models


def _profile(path: Path, key: ProfileKey, model: str, data: Mapping[str, Any]) -> Profile:
    try:
        return Profile.from_json(key, model, data)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(str(path), f"the profile of {model} is damaged ({error})") from None


def _compact(document: dict[str, Any]) -> str:
    """JSON with a line per innermost list, so that two profiles can be compared with diff."""
    text = json.dumps(document, indent=1, allow_nan=False)
    return re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda match: "[" + re.sub(r"\s*\n\s*", " ", match[1]) + "]", text) + "\n"
