"""Shapes of decode attention that no kernel was made for, and the workspace a shape needs."""

from __future__ import annotations

import pytest

from nf.errors import InputError
from nf.kernels.decode_attention import ON_FEW_SMS, ON_MANY_SMS, DecodeShape, ring_on, sources


@pytest.mark.parametrize(
    ("sizes", "field"),
    [((32, 8, 96, 16), "head_dim"), ((32, 8, 128, 48), "page_size"), ((18, 2, 128, 16), "num_heads")],
)
def test_refused_shapes(sizes: tuple[int, int, int, int], field: str) -> None:
    with pytest.raises(InputError) as error:
        DecodeShape(*sizes)
    assert error.value.field == field


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(InputError) as error:
        DecodeShape(9, 4, 128, 16)
    assert error.value.field == "num_heads"


@pytest.mark.parametrize("sms", [1, 16, 64, 65, 132])
def test_no_launch_has_more_warps_than_the_workspace_has_spans(sms: int) -> None:
    shape = DecodeShape(32, 8, 128, 16)
    for used in range(1, sms + 1):
        assert used * ring_on(used).warps <= shape.max_spans(sms)


def test_few_sms_have_a_ring_of_their_own() -> None:
    assert [ring_on(sms) for sms in (2, 64, 66, 132)] == [ON_FEW_SMS, ON_FEW_SMS, ON_MANY_SMS, ON_MANY_SMS]
    assert ON_FEW_SMS.shared_bytes > ON_MANY_SMS.shared_bytes


def test_workspace_holds_plan_and_parts() -> None:
    shape = DecodeShape(32, 8, 128, 16)
    spans = shape.max_spans(132)
    plan, stats, out = 32 + 64 * spans, 2 * spans * 64, 2 * spans * 8 * 128 * 4
    assert plan + stats + out <= shape.workspace_bytes(132) < plan + stats + out + 256


def test_names_are_unique() -> None:
    names = [source.name for source in sources()]
    assert len(set(names)) == len(names) == 14
