"""Stored plans: found by shape, GPU and size, the user's in place of the built-in ones, never a reason to fail."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nf.config import ModelConfig
from nf.errors import PlanError
from nf.graphs import plan_store
from nf.graphs.plan import PipelinePlan, load_plan, nano_batch_plan
from nf.graphs.plan_store import find_plans, save_plans, user_folder
from nf.models.registry import declare
from nf.models.shapes import SHAPES

CONFIG = ModelConfig("LlamaForCausalLM", 64, 32, 64, 2, 4, 2, 8, 1e-5, 64)
MODEL = declare(CONFIG)
NANO = replace(nano_batch_plan(MODEL.operations, 256), loads=((80, 900), (60, 700)))
GPU = "NVIDIA H200"


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder is empty, and so is the one that ships."""
    monkeypatch.setenv("NF_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(plan_store, "BUILT_IN_FOLDER", tmp_path / "built-in")
    return tmp_path


def plan(size: int, decode_tokens: int | None, name: str = "nano-batch") -> PipelinePlan:
    loads = ((decode_tokens, 900),) if decode_tokens else ()
    return replace(nano_batch_plan(MODEL.operations, size), loads=loads, name=name)


def found(dense_batch_size: int = 256, **options: int) -> dict[tuple[int, int | None], str]:
    """What an engine finds: names of plans by what they are for."""
    stored = find_plans(MODEL, GPU, dense_batch_size, **options)  # type: ignore[arg-type]
    names = {(each.plan.dense_batch_size, next(iter(each.plan.loads), (None,))[0]): each.plan.name for each in stored}
    assert len(names) == len(stored)
    return names


def test_what_is_saved_is_found_for_that_shape_gpu_and_batch_alone() -> None:
    decoding = plan(256, 256)
    paths = save_plans([NANO, decoding], CONFIG, GPU, {"seconds": 0.5})
    assert [path.name.rpartition("-b")[2] for path in paths] == ["256-d80x900.json", "256-d256x900.json"]
    assert all(path.is_relative_to(user_folder()) for path in paths)
    stored = find_plans(MODEL, GPU, 256)
    assert {each.path: each.plan for each in stored} == dict(zip(paths, (NANO, decoding), strict=True))
    (measured,) = user_folder().rglob("*.measured.json")
    assert json.loads(measured.read_text()) == {"seconds": 0.5}
    assert load_plan(paths[0], MODEL.operations) == NANO  # an ordinary plan file
    assert find_plans(MODEL, "NVIDIA H100", 256) == []
    assert find_plans(declare(replace(CONFIG, hidden_size=64)), GPU, 256) == []
    same_shape = replace(CONFIG, max_position_embeddings=4096, eos_token_ids=(5,))
    assert len(find_plans(declare(same_shape), GPU, 256)) == 2


def test_plans_for_more_tokens_than_any_step_has_are_left_out() -> None:
    for size in (128, 256, 512):
        save_plans([plan(size, 40)], CONFIG, GPU, {})
    assert found(256).keys() == {(128, 40), (256, 40)}
    assert found(511).keys() == {(128, 40), (256, 40)}
    assert found(100) == {}


def test_the_users_plans_replace_those_that_ship_of_the_same_size(folders: Path) -> None:
    built_in = folders / "built-in"
    save_plans([plan(256, 80, "ships"), plan(256, 160, "ships")], CONFIG, GPU, {}, folder=built_in)
    save_plans([plan(128, 40, "ships")], CONFIG, GPU, {}, folder=built_in)
    assert found() == {(256, 80): "ships", (256, 160): "ships", (128, 40): "ships"}
    save_plans([plan(256, 100, "mine")], CONFIG, GPU, {})
    assert found() == {(256, 100): "mine", (128, 40): "ships"}


def test_saving_removes_what_was_saved_for_that_size_before() -> None:
    (old,) = save_plans([plan(256, 80)], CONFIG, GPU, {})
    undivided = old.with_name(old.name.replace("-d80x900", ""))
    undivided.write_text(plan(256, None).to_json())
    save_plans([plan(2560, 80)], CONFIG, GPU, {})
    save_plans([plan(25, 8)], CONFIG, GPU, {})
    assert found(2560).keys() == {(256, 80), (256, None), (2560, 80), (25, 8)}
    save_plans([plan(256, 10), plan(256, 20, "first"), plan(256, 20, "last")], CONFIG, GPU, {"newer": True})
    assert found(2560).keys() == {(256, 10), (256, 20), (2560, 80), (25, 8)}
    assert found()[256, 20] == "last"
    assert not undivided.exists()
    names = sorted(path.name.rpartition("-b")[2] for path in old.parent.iterdir())
    assert [name for name in names if name.startswith("256-") or name.startswith("256.")] == [
        "256-d10x900.json",
        "256-d20x900.json",
        "256.measured.json",
    ]


def test_a_stored_plan_that_cannot_be_used_is_passed_over(folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_plans([plan(256, 80, "ships")], CONFIG, GPU, {}, folder=folders / "built-in")
    broken, other = save_plans([plan(256, 80), plan(256, 160)], CONFIG, GPU, {})
    broken.write_text("{")
    with caplog.at_level(logging.WARNING), pytest.raises(PlanError):
        load_plan(broken, MODEL.operations)
    assert found() == {(256, 160): "nano-batch"}
    assert str(broken) in caplog.text
    other.write_text(other.read_text().replace('"loads": [[160, 900]]', '"loads": [[257, 900]]'))
    assert found() == {(256, 80): "ships"}  # none of the user's is left
    assert "loads[0]: must be 1 to 256 decode tokens" in caplog.text
    split = replace(NANO, streams=tuple(replace(s, sms=66) for s in NANO.streams))
    save_plans([split], CONFIG, GPU, {}, folder=folders / "built-in")
    assert found(gpu_sms=64) == {}
    assert found(gpu_sms=132).keys() == {(256, 80)}


def test_a_store_that_is_not_there_or_is_no_folder_has_no_plans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert found() == {}
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NF_CACHE_DIR", str(tmp_path / "file"))
    assert found() == {}


def test_a_store_where_one_may_not_look_has_no_plans(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_plans([plan(256, 80, "ships")], CONFIG, GPU, {}, folder=folders / "built-in")
    save_plans([plan(256, 80, "mine")], CONFIG, GPU, {})
    assert found() == {(256, 80): "mine"}

    def refusing(call: Any) -> Any:
        def refuse(path: Any, *args: Any, **options: Any) -> Any:
            if isinstance(path, str | os.PathLike) and Path(path).is_relative_to(user_folder()):
                raise PermissionError(13, "Permission denied", str(path))
            return call(path, *args, **options)

        return refuse

    for name in ("stat", "lstat", "scandir"):  # root may look everywhere
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    assert found() == {(256, 80): "ships"}


def test_no_two_known_shapes_share_a_file() -> None:
    beginnings = {plan_store.prefix(config, GPU) for config in SHAPES.values()}
    assert len(beginnings) == len({replace(c, rope=CONFIG.rope, max_position_embeddings=1) for c in SHAPES.values()})
    assert not any(a != b and a.startswith(b) for a in beginnings for b in beginnings)


def test_every_plan_that_ships_is_found_for_the_shape_it_is_stored_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    files = {path for path in plan_store.BUILT_IN_FOLDER.rglob("*.json") if ".measured" not in path.name}
    assert files
    for path in files:
        gpu, (beginning, _, numbers) = path.parent.name, path.stem.rpartition("-b")
        fitting = [c for c in SHAPES.values() if plan_store.prefix(c, gpu) == f"{gpu}/{beginning}-b"]
        assert fitting, path
        size, _, load = numbers.partition("-d")
        stored = find_plans(declare(fitting[0]), gpu, int(size), folder=tmp_path, gpu_sms=132)
        (own,) = (each.plan for each in stored if each.path == path)
        assert own.dense_batch_size == int(size)
        assert "{}x{}".format(*own.loads[0]) == load
