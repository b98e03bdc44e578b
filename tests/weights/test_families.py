"""The table of families: it is complete, and says of every kind of config who answers it."""

from __future__ import annotations

import pytest

from vlpjax.errors import UserError
from vlpjax.weights.families import FAMILIES, all_families, family_of, model_type


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_architecture_in_the_table_has_its_family(kind):
    assert kind in family_of({"model_type": kind}).model_types


def test_names_are_unique_and_every_family_can_be_found():
    families = list(all_families())
    assert len({family.name for family in families}) == len(families)
    missing = {kind for family in families for kind in family.model_types} - FAMILIES.keys()
    assert not missing, "these model types are not in FAMILIES"


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"model_type": "bert", "architecture": "x"}, "bert"),
        ({"architecture": "vit_small_patch16_224"}, "timm"),
        ({"model_cfg": {}, "preprocess_cfg": {}}, "open_clip"),
        ({}, ""),
    ],
)
def test_configs_without_a_model_type_are_told_by_their_fields(config, kind):
    assert model_type(config) == kind


def test_an_unknown_architecture_lists_the_known_ones():
    with pytest.raises(
        UserError, match=r"'dinov', .*did you mean 'dinov2'.*there are clip, .*, open_clip"
    ) as caught:
        family_of({"model_type": "dinov"})
    assert all(kind in str(caught.value) for kind in FAMILIES)
