"""The cases that the planner is held against: settings that the experiment has, and times that fit their tokens."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tools.validate_plan import CASES, EXPERIMENT, Case, comparison
from vlpjax import config as configs
from vlpjax.models.stack import remat_policy
from vlpjax.planning import topology
from vlpjax.planning.schedule import Timeline, Total


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_is_settings_of_our_decoder(case: Case) -> None:
    chips = topology.chips_of(case.topology)
    config = configs.apply_overrides(configs.load(EXPERIMENT), case.overrides(chips))
    assert config.data.train.batch_size == case.rows * chips
    assert config.towers.decoder.length == case.length
    assert config.compiler_options == ()
    remat_policy(config.towers.decoder.remat)


def test_a_case_says_where_its_time_is_published() -> None:
    assert len(CASES) >= 5
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        assert case.source.startswith("https://github.com/")


def test_errors_are_signed_and_their_median_is_of_their_sizes() -> None:
    def planned(seconds: float) -> Any:
        line = Timeline(seconds=seconds, collectives={("all-gather", "fsdp"): Total(1, 3e9, 0.0)})
        return SimpleNamespace(timeline=line, memory=SimpleNamespace(peak=2e9))

    cases = [replace(CASES[0], name=f"case{at}", seconds=2.0) for at in range(3)]
    said = comparison([*zip(cases, map(planned, (1.0, 2.2, 2.6)), strict=True)])
    rows = [line.split() for line in said.splitlines() if line.startswith("case") and " ms" in line]
    assert [row[5] for row in rows] == ["-50.0%", "+10.0%", "+30.0%"]
    assert rows[0][-2:] == ["2.0", "3.0"]
    assert "median absolute error of 3: 30.0%" in said


def test_nothing_planned_is_said() -> None:
    assert comparison([]) == "No case was planned."
