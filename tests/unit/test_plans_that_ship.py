"""The plans that ship, held against what was measured: whether they win where they are taken, and were foreseen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from nf.bench.measure import Measurement
from nf.bench.steady_step import Load
from nf.graphs.plan import load_plan, sequential_plan
from nf.graphs.plan_store import BUILT_IN_FOLDER, MEASURED_SUFFIX, find_plans, shape_name
from nf.graphs.pool import GraphPool, step_plans
from nf.models.registry import declare
from nf.models.shapes import shape
from nf.planning.coverage import covering_plans
from nf.planning.loads import batch_shape, made_for
from nf.planning.predict import of_plan
from nf.planning.profile_file import read_profile
from nf.planning.search import Result, Search, candidate_of

ROOT = Path(__file__).parents[2]
PROFILE = ROOT / "docs/benchmarks/2026-11-29-h200-spread-profile.json"
MODEL = declare(shape("llama-3-8b"))
SIZE, SMS, GPU = 2048, 132, "NVIDIA H200"
KV_TOKENS = 898_327  # of the KV cache there
RECORDS = sorted(BUILT_IN_FOLDER.rglob(f"*{MEASURED_SUFFIX}"))


def measured() -> dict[str, Any]:
    (path,) = BUILT_IN_FOLDER.rglob(f"{shape_name(MODEL.config)}-b{SIZE}{MEASURED_SUFFIX}")
    record: dict[str, Any] = json.loads(path.read_text())
    return record


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.name)
def test_what_ships_is_what_was_the_fastest_at_every_load(path: Path) -> None:
    record = json.loads(path.read_text())
    for number, load in enumerate(record["loads"]):
        measured_s = {plan["name"]: plan["loads"][number]["measured_s"] for plan in record["plans"]}
        rivals = {name: seconds for name, seconds in measured_s.items() if seconds is not None}
        best = min(rivals.values())
        assert rivals[load["chosen"]] <= best * 1.003 or load["chosen"] == "sequential"
        assert rivals[load["chosen"]] <= rivals["sequential"]
        assert load["speed_up"] == pytest.approx(rivals["sequential"] / rivals[load["chosen"]])
        own = made_for(Load(record["dense_batch_size"], load["input_len"], load["output_len"]))
        stored = path.parent.glob(f"{path.name.removesuffix(MEASURED_SUFFIX)}-d*.json")
        (chosen,) = (plan for file in stored if own in (plan := load_plan(file, MODEL.operations)).loads)
        assert chosen.name == load["chosen"]


def test_a_full_step_takes_the_plan_that_won_at_its_load(tmp_path: Path) -> None:
    plans = [stored.plan for stored in find_plans(MODEL, GPU, SIZE, folder=tmp_path, gpu_sms=SMS)]
    steps = step_plans([sequential_plan(MODEL.operations, SIZE), *plans], MODEL.operations)
    pool = GraphPool([(step, step) for step in steps])  # type: ignore[misc]
    for load in measured()["loads"]:
        batch = Load(SIZE, load["input_len"], load["output_len"]).batch(page_size=16)
        assert batch.num_decode == load["decode_tokens"]
        assert pool.find(SIZE, batch.num_decode, batch.decode_keys)[0].plan.name == load["chosen"]
    assert pool.find(SIZE, 1300, 1300 * 200)[0].plan.name == "sequential"  # many, but with little to read
    assert pool.find(SIZE, 0, 0)[0].plan.name == "sequential"
    assert pool.find(640, 640, 640 * 1280)[0].plan.name == "sequential"


def test_the_profile_foresaw_what_was_measured() -> None:
    """Within the 10 % that are promised of the median; profile and steps were measured an hour apart."""
    profile, record = read_profile(PROFILE, shape_name(MODEL.config)), measured()
    plans = {stored.plan.name: stored.plan for stored in find_plans(MODEL, GPU, SIZE, folder=Path("nowhere"))}
    errors = []
    for plan in record["plans"]:
        for load, found in zip(record["loads"], plan["loads"], strict=True):
            if plan["name"] in plans:
                shape_ = batch_shape(Load(SIZE, load["input_len"], load["output_len"]))
                predicted = of_plan(plans[plan["name"]], MODEL, profile, shape_)
                assert predicted is not None
                errors.append(abs(predicted.seconds / found["measured_s"] - 1))
    assert len(errors) == len(plans) * len(record["loads"]) >= 12
    assert median(errors) <= 0.1
    assert max(errors) <= 0.1


def test_the_loads_that_ship_follow_from_profile_and_measurements() -> None:
    profile, written = read_profile(PROFILE, shape_name(MODEL.config)), measured()
    loads = tuple(Load(SIZE, load["input_len"], load["output_len"]) for load in written["loads"])
    shipped = {stored.plan.name: stored.plan for stored in find_plans(MODEL, GPU, SIZE, folder=Path("nowhere"))}
    results = {}
    for own in written["plans"]:
        if own["name"] in shipped:
            plan = replace(shipped[own["name"]], loads=())
            seconds = tuple(Measurement(load["measured_s"], load["measured_j"]) for load in own["loads"])
            results[own["name"]] = Result(candidate_of(plan, own["kind"], MODEL, profile, loads), seconds)
    best = tuple(results[load["chosen"]] for load in written["loads"])
    found = Search(loads, tuple(results.values()), best)
    assert {plan.name: plan for plan in covering_plans(found, MODEL, profile, KV_TOKENS)} == shipped
