"""Stored plans: found by shape, GPU and batch, the user's before the built-in ones, and never a reason to fail."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from nf.config import ModelConfig
from nf.errors import PlanError
from nf.graphs import plan_store
from nf.graphs.plan import load_plan, nano_batch_plan, sequential_plan
from nf.graphs.plan_store import find_plan, save_plan, user_folder
from nf.models.registry import declare
from nf.models.shapes import SHAPES

CONFIG = ModelConfig("LlamaForCausalLM", 64, 32, 64, 2, 4, 2, 8, 1e-5, 64)
MODEL = declare(CONFIG)
NANO = nano_batch_plan(MODEL.operations, 256)
GPU = "NVIDIA H200"


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder is empty, and so is the one that ships."""
    monkeypatch.setenv("NF_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(plan_store, "BUILT_IN_FOLDER", tmp_path / "built-in")
    return tmp_path


def test_what_is_saved_is_found_for_that_shape_gpu_and_batch_alone() -> None:
    path = save_plan(NANO, CONFIG, GPU, {"seconds": 0.5})
    assert path.is_relative_to(user_folder())
    found = find_plan(MODEL, GPU, 256)
    assert found is not None
    assert (found.plan, found.path) == (NANO, path)
    assert json.loads(path.with_name(path.stem + ".measured.json").read_text()) == {"seconds": 0.5}
    assert load_plan(path, MODEL.operations) == NANO  # an ordinary plan file
    assert find_plan(MODEL, GPU, 512) is None
    assert find_plan(MODEL, "NVIDIA H100", 256) is None
    assert find_plan(declare(replace(CONFIG, hidden_size=64)), GPU, 256) is None
    same_shape = replace(CONFIG, max_position_embeddings=4096, eos_token_ids=(5,))
    assert find_plan(declare(same_shape), GPU, 256) is not None


def test_the_users_plan_goes_before_the_one_that_ships(folders: Path) -> None:
    save_plan(NANO, CONFIG, GPU, {}, folder=folders / "built-in")
    found = find_plan(MODEL, GPU, 256)
    assert found is not None
    assert found.plan == NANO
    mine = sequential_plan(MODEL.operations, 256)
    save_plan(mine, CONFIG, GPU, {})
    found = find_plan(MODEL, GPU, 256)
    assert found is not None
    assert found.plan == mine


def test_a_stored_plan_that_cannot_be_used_is_passed_over(folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_plan(NANO, CONFIG, GPU, {}, folder=folders / "built-in")
    path = save_plan(NANO, CONFIG, GPU, {})
    path.write_text("{")
    with caplog.at_level(logging.WARNING), pytest.raises(PlanError):
        load_plan(path, MODEL.operations)
    found = find_plan(MODEL, GPU, 256)
    assert found is not None
    assert found.path != path
    assert str(path) in caplog.text
    split = replace(NANO, streams=tuple(replace(s, sms=66) for s in NANO.streams))
    save_plan(split, CONFIG, GPU, {}, folder=folders / "built-in")
    assert find_plan(MODEL, GPU, 256, gpu_sms=64) is None
    assert find_plan(MODEL, GPU, 256, gpu_sms=132) is not None


def test_no_two_known_shapes_share_a_file() -> None:
    names = {plan_store.file_name(config, GPU, 2048) for config in SHAPES.values()}
    assert len(names) == len({replace(c, rope=CONFIG.rope, max_position_embeddings=1) for c in SHAPES.values()})


def test_every_plan_that_ships_fits_the_shape_it_is_stored_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    files = {path for path in plan_store.BUILT_IN_FOLDER.rglob("*.json") if ".measured" not in path.name}
    for path in files:
        gpu, size = path.parent.name, int(path.stem.rpartition("-b")[2])
        fitting = [c for c in SHAPES.values() if plan_store.file_name(c, gpu, size) == f"{gpu}/{path.name}"]
        assert fitting, path
        assert load_plan(path, declare(fitting[0]).operations, size, gpu_sms=132).dense_batch_size == size
