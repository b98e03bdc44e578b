"""The cases that the planner is held against: settings that the experiment has, and times that fit their tokens."""

from __future__ import annotations

import pytest

from tools.validate_plan import CASES, EXPERIMENT, Case, comparison
from vlpjax import config as configs
from vlpjax.models.stack import remat_policy
from vlpjax.planning import topology


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_is_settings_of_our_decoder(case: Case) -> None:
    chips = topology.chips_of(case.topology)
    config = configs.apply_overrides(configs.load(EXPERIMENT), case.overrides(chips))
    assert config.data.train.batch_size == case.rows * chips
    assert config.towers.decoder.length == case.length
    assert config.compiler_options == case.options
    remat_policy(config.towers.decoder.remat)


def test_a_case_says_where_its_time_is_published() -> None:
    assert len(CASES) >= 5
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        assert case.source.startswith("https://github.com/")


def test_nothing_planned_is_said() -> None:
    assert comparison([]) == "No case was planned."
