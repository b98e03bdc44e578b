"""What a plan says of its figures: what bounds the run, what to try, and rates in tokens or in examples."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from vlpjax.planning.report import Memory, Plan, as_json, as_text, bound, comparison
from vlpjax.planning.schedule import Timeline, Total

GB = 1e9
GATHERED = {("all-gather", "fsdp"): Total(3, 6 * GB, 0.5)}


def memory(peak: float = 10 * GB, temporaries: float = 6 * GB) -> Memory:
    return Memory(peak, 16 * GB, 1 * GB, 2 * GB, 0.0, 0.0, 1 * GB, temporaries, 0.0)


def plan(line: Timeline | None = None, **fields: Any) -> Plan:
    """A step of a second, all of it products at the peak, of four chips and 64 examples."""
    usual = dict(
        name="one", topology="v5e:2x2", chip="v5e", chips=4, devices=4, mesh={"fsdp": 4}, batch=64, tokens=0,
        steps=86_400, accumulate=1, memory=memory(), model_flops=4e12, compiled_flops=4e12,
        timeline=line or Timeline(seconds=1.0, compute=1.0, flops=1e12), peak_flops=1e12,
        attention_efficiency=0.5, attention_share=1.0, compile_seconds=1.0,
    )  # fmt: skip
    return Plan(**(usual | fields))


WAITING = Timeline(seconds=1.0, compute=0.3, flops=0.3e12, collectives=GATHERED)
ATTENTION = Timeline(
    seconds=1.0, compute=0.3, flops=0.3e12, kernels={("flash_forward", ""): Total(2, 1e11, 0.6)}
)
UNTIMED = Timeline(
    seconds=1.0, compute=0.1, flops=0.1e12, untimed={("sort", ""): Total(1, 1.0, 0.5)}, collectives=GATHERED
)


@pytest.mark.parametrize(
    ("found", "by"),
    [
        (plan(), "compute"),
        (plan(WAITING), "communication"),
        (plan(ATTENTION), "attention"),
        (plan(UNTIMED), "compute"),
        (plan(WAITING, memory=memory(peak=17 * GB)), "memory"),
    ],
)
def test_what_takes_most_of_the_step_bounds_it(found: Plan, by: str) -> None:
    assert bound(found) == by
    assert f"bound by: {by}" in as_text(found)


def test_rates_follow_from_the_step() -> None:
    found = plan()
    assert (found.mfu, found.examples_per_second, found.days, found.fits) == (1.0, 16.0, 1.0, True)
    text = dataclasses.replace(found, tokens=100)
    assert as_json(text)["tokens_per_second_and_chip"] == 1600
    assert "tokens per second and chip" in as_text(text) and "of 100 tokens" in as_text(text)
    assert "tokens" not in as_text(found)


def test_time_on_the_links_is_exposed_or_hidden() -> None:
    line = as_json(plan(WAITING))["step"]
    assert line["exposed_seconds"] == pytest.approx(0.7)
    assert line["hidden_seconds"] == 0  # what waits is more than what the links take
    line = as_json(plan(dataclasses.replace(WAITING, compute=0.8)))["step"]
    assert line["hidden_seconds"] == pytest.approx(0.3)
    assert line["collectives"] == [
        {"kind": "all-gather", "axes": "fsdp", "count": 3, "amount": 6 * GB, "seconds": 0.5}
    ]


def test_advice_names_what_is_in_the_way() -> None:
    waits = as_text(plan(WAITING))
    assert "70% of the step waits for data, most of it for all-gather over fsdp (6 GB, 500.0 ms)" in waits
    many = as_text(plan(memory=memory(peak=17 * GB, temporaries=13 * GB)))
    assert "It does not fit: 17 GB of 16 GB.  Most of it is temporaries" in many
    assert "Most of it is the state" in as_text(plan(memory=memory(peak=17 * GB, temporaries=1 * GB)))
    again = as_text(plan(compiled_flops=5.2e12))
    assert "computes 1.30 times the model's FLOPs, and 6 GB are free: rematerialise less" in again
    assert "rematerialise less" not in as_text(plan(compiled_flops=5.2e12, memory=memory(peak=15 * GB)))
    slow = as_text(plan(Timeline(seconds=1.0, compute=1.0, flops=0.5e12)))
    assert "Matrix products at the chip's peak would be 50% of the compute time" in slow
    assert "note: mind this" in as_text(plan(notes=("mind this",)))
    calm = as_text(plan())
    assert not any(word in calm for word in ("waits for data", "does not fit", "rematerialise", "peak would"))


def test_plans_stand_side_by_side() -> None:
    head, _, one, other = comparison([("", plan()), ("mesh.fsdp=2", plan(WAITING, tokens=100))]).splitlines()
    assert head.split()[:2] == ["setting", "mesh"]
    assert one.startswith("as configured") and one.split()[-3:] == ["16.00", "0.00", "compute"]
    assert other.startswith("mesh.fsdp=2") and other.split()[-3:] == ["1,600", "6.00", "communication"]
