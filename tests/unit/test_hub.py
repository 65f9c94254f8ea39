"""resolve_model: directories, the bundled model, and the hub with and without its client."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from nf.errors import ModelError
from nf.hub import resolve_model


def test_a_directory_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name") == Path("org/name")  # a directory wins over the hub
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/org") == tmp_path / "org"


def test_the_bundled_model_comes_with_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_model("nf-tiny") == Path(__file__).parents[2] / "nf" / "bundled" / "nf-tiny"


@pytest.mark.parametrize(
    "name", ["", "no-such-model", "/no/such/dir", "./a/b", "a/b/c", "org/na me", "a\0b", "x" * 5000]
)
def test_neither_directory_nor_hub_name(name: str) -> None:
    with pytest.raises(ModelError, match="is neither a directory, a hub name like org/name, nor 'nf-tiny'"):
        resolve_model(name)


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(ModelError, match="is a file; a model is a directory"):
        resolve_model(str(file))


def test_without_the_client_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelError, match=r"org/name: is not a directory here; .* pip install 'nf\[hub\]'"):
        resolve_model("org/name")


def test_only_what_is_read_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(repo_id: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        files = [
            "config.json",
            "chat_template.jinja",
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "consolidated.safetensors",
            "original/consolidated.00.pth",
            "onnx/model.json",
            "modeling_custom.py",
        ]
        kept = huggingface_hub.utils.filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        asked[repo_id] = list(kept)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model("org/name") == tmp_path
    assert asked == {
        "org/name": [
            "config.json",
            "chat_template.jinja",
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
        ]
    }
    resolve_model("org/name", config_only=True)
    assert asked == {"org/name": ["config.json"]}


def offline(home: Path, name: str) -> subprocess.CompletedProcess[str]:
    """Resolve a name in a process of its own: the client reads its environment on import."""
    code = "import sys, nf.hub\ntry: print(nf.hub.resolve_model(sys.argv[1]))\nexcept ValueError as e: sys.exit(str(e))"
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, name]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_offline_cache(tmp_path: Path) -> None:
    """A real cache under HF_HOME is found with HF_HUB_OFFLINE; what is not in it is one sentence."""
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text("{}")
    found = offline(tmp_path, "org/name")
    assert found.stdout.strip() == str(snapshot), found.stderr
    missing = offline(tmp_path, "org/other")
    assert missing.returncode == 1
    assert missing.stderr.startswith("org/other: could not be had from the Hugging Face hub: ")
    assert len(missing.stderr.strip().splitlines()) == 1
