"""Where a record says it was made: the commit of the code that ran and no other, and JSON that any reader takes."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nf.bench import environment

SOURCE = Path(environment.__file__)


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=n", "-c", "user.email=n@example.org")
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def placed(folder: Path, text: str | None = None) -> Any:
    """The module as it would run from ``folder``."""
    file = folder / SOURCE.name
    file.write_text(SOURCE.read_text() if text is None else text)
    spec = importlib.util.spec_from_file_location("placed", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with an empty commit."""
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "commit", "--quiet", "--allow-empty", "-m", "first")
    return tmp_path


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """What pip has noted of nf's installation: direct_url.json, which tests may set."""
    noted: dict[str, str | None] = {"direct_url.json": None}
    monkeypatch.setattr(metadata, "distribution", lambda _name: SimpleNamespace(read_text=noted.get))
    return noted


@pytest.mark.usefixtures("pip")
def test_commit_of_a_checkout(checkout: Path) -> None:
    module = placed(checkout)
    git(checkout, "add", SOURCE.name)
    git(checkout, "commit", "--quiet", "-m", "second")
    commit = git(checkout, "rev-parse", "HEAD")
    assert commit.startswith(module.commit())
    (checkout / SOURCE.name).write_text("changed\n")
    assert module.commit().endswith("-dirty")


@pytest.mark.usefixtures("pip")
def test_a_checkout_around_a_copy_is_not_its_own(checkout: Path) -> None:
    assert placed(checkout).commit() is None


@pytest.mark.usefixtures("pip")
def test_commit_of_an_archive(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    placed(checkout)
    (checkout / ".gitattributes").write_text(f"{SOURCE.name} export-subst\n")
    git(checkout, "add", ".")
    git(checkout, "commit", "--quiet", "-m", "second")
    text = git(checkout, "archive", "--format=tar", "HEAD", SOURCE.name)
    body = text[text.index('"""') : text.rindex("\n") + 1].rstrip("\0")
    found = placed(tmp_path_factory.mktemp("unpacked"), body).commit()
    assert git(checkout, "rev-parse", "HEAD").startswith(found)


def test_commit_that_pip_installed(tmp_path: Path, pip: dict[str, str | None]) -> None:
    module = placed(tmp_path)
    assert module.commit() is None
    pip["direct_url.json"] = json.dumps({"url": "https://example.org/nf", "vcs_info": {"commit_id": "0123abc"}})
    assert module.commit() == "0123abc"
    pip["direct_url.json"] = json.dumps({"url": "file:///nf", "dir_info": {"editable": True}})
    assert module.commit() is None


def test_a_record_has_null_for_nan(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    environment.write_record(file, {"rows": [{"joules": math.nan, "watts": (math.inf, 1.5)}], "name": "n"})
    assert json.loads(file.read_text()) == {"rows": [{"joules": None, "watts": [None, 1.5]}], "name": "n"}
