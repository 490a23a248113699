from __future__ import annotations

import pytest

from frostline.exporter.variant import MICRO_BATCHES, WHOLE, Variant, variants_of


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        (WHOLE, "whole"),
        (Variant(), "whole"),
        (Variant(recompute=True), "whole+recompute"),
        (Variant(2), "micro2"),
        (Variant(4, recompute=True), "micro4+recompute"),
    ],
)
def test_variants_are_named_by_what_they_do(variant: Variant, name: str) -> None:
    assert variant.name == name


@pytest.mark.parametrize(
    ("batch", "counts"), [(1, [1]), (7, [1]), (6, [1, 2]), (12, [1, 2, 4]), (16, [1, 2, 4, 8])]
)
def test_a_batch_has_variants_in_equal_parts_alone(batch: int, counts: list[int]) -> None:
    variants = list(variants_of(batch))
    assert [(v.micro_batches, v.recompute) for v in variants] == [
        (count, recompute) for recompute in (False, True) for count in counts
    ]


def test_the_first_variant_is_the_plain_one_and_no_two_have_one_name() -> None:
    variants = list(variants_of(16))
    assert variants[0] == WHOLE
    assert len({variant.name for variant in variants}) == len(variants) == 2 * len(MICRO_BATCHES)
