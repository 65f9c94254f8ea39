"""Every architecture against transformers in float32 on the same GPU; scripts/check_parity.py does it at full width."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from nf.graphs.plan import nano_batch_plan

pytestmark = pytest.mark.gpu

SEQUENCES = 12  # models so narrow have many near ties: one sequence cannot tell 98.8 % from 99.1 %
NAMES = ("llama", "mistral", "qwen2", "qwen3", "mixtral")


@pytest.fixture(scope="module")
def parity() -> ModuleType:
    """Needs PyTorch and transformers, which take a while to import."""
    import parity

    assert set(parity.CASES) == set(NAMES)
    return parity


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(parity: ModuleType, name: str, tmp_path: Path) -> None:
    model = parity.write_checkpoint(tmp_path, parity.CASES[name].config(small=True), device="cuda")
    plan = nano_batch_plan(model.operations, parity.DENSE_BATCH_SIZE)
    ours, theirs = parity.measure(model, tmp_path, plan, SEQUENCES)
    report = f"{ours}; transformers in bfloat16: {theirs}"
    # Of so many positions the worst may lie beyond the bound where bfloat16 itself does.
    assert ours.error <= max(parity.ERROR, theirs.error), report
    assert ours.mean_error <= theirs.mean_error, report
    assert ours.agreement >= parity.AGREEMENT, report
