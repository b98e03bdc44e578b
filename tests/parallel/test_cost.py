"""The cost model against sums by hand, and its choice: never slower than what fits, with the published limits."""

from __future__ import annotations

import dataclasses
import logging

import jax.numpy as jnp
import pytest

from vlpjax.errors import UserError
from vlpjax.hardware import CHIPS
from vlpjax.mesh import make_layout
from vlpjax.parallel import cost
from vlpjax.parallel.cost import BACKWARD, Problem, choose, estimate, estimates, pick_scheme, table
from vlpjax.parallel.sequence import SCHEMES

V5P, H100 = CHIPS["v5p"], CHIPS["H100"]
# A decoder of 8B parameters: 32 heads, 8 of keys and values; a million tokens over 64 chips.
LONG = Problem(1, 2**20, 32, 8, 128, ring=8, ulysses=8)
KEYS = 2 * 2**20 * 8 * 128  # elements of all keys and values


def test_gathered_keys_move_and_hold_what_they_are() -> None:
    found = estimate(LONG, "gather", V5P)
    assert found.moved == pytest.approx(KEYS * 63 / 64 * (2 + 2 + 4))
    assert found.memory == KEYS * (2 + 4)  # 4 GiB of keys and values, 8 of their float32 gradients
    assert found.memory / 2**30 == 12
    assert found.links == found.exposed == pytest.approx(found.moved / (2 * 90e9))


def test_compute_is_that_of_the_pairs_that_are_seen() -> None:
    causal = estimate(LONG, "gather", V5P, efficiency=1.0).compute
    assert causal == pytest.approx((1 + BACKWARD) * 4 * 2**40 / 2 * 32 * 128 / 64 / 459e12)
    packed = dataclasses.replace(LONG, seen=0.05)
    assert estimate(packed, "gather", V5P, 1.0).compute == pytest.approx(causal / 10)
    assert estimate(LONG, "gather", V5P, 0.5).compute == pytest.approx(2 * causal)


def test_a_ring_moves_keys_once_around_and_hides_them_behind_long_chunks() -> None:
    found = estimate(LONG, "ring", V5P)
    part = KEYS / 64
    assert found.moved == pytest.approx(63 * part * (2 + 2 + 4) + 2 * part * 4)
    assert found.exposed == pytest.approx(part * 4 / 90e9)  # the gradients' last way home
    assert found.memory == 2 * part * (2 + 4) + 4 * 2**20 / 64 * 32 * 128  # and the queries' float32 sums
    assert found.memory < estimate(LONG, "gather", V5P).memory / 16
    # Below a certain number of tokens per chip the links are slower than the kernels: 2 Hkv / Hq F / W on paper.
    short = dataclasses.replace(LONG, length=2**16)
    assert 2 * 8 / 32 * V5P.bf16_flops / V5P.ici_bandwidth > 2**16 / 64
    assert estimate(short, "ring", V5P, 1.0).exposed > 0.3 * estimate(short, "ring", V5P, 1.0).links


def test_exchanged_heads_move_queries_and_repeated_keys() -> None:
    tokens = 2**20 / 64
    # Eight heads of keys for 64 ranks, where 32 heads of queries go to 32 at most.
    assert "cannot be dealt out" in str(estimate(LONG, "ulysses", V5P).refused)
    problem = dataclasses.replace(LONG, ring=1, ulysses=16, length=2**18)
    found = estimate(problem, "ulysses", V5P)
    query, pair = tokens * 32 * 128, 2 * tokens * 16 * 128  # each head of keys twice
    size = 2 * (2 * query + pair + 4 * query + 2 * pair)
    assert found.moved == pytest.approx(size * 15 / 16)
    assert found.links == pytest.approx(16 * size * 15 / 16 / (2 * 90e9) / 4)


def test_switches_end_at_their_domain() -> None:
    inside = dataclasses.replace(LONG, ring=1, ulysses=8)
    across = dataclasses.replace(LONG, ring=8, ulysses=2)
    moved = estimate(inside, "gather", H100)
    assert moved.links == pytest.approx(moved.moved / 450e9)
    moved = estimate(across, "gather", H100)
    assert moved.links == pytest.approx(moved.moved / 50e9)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize("length", [2**n for n in range(15, 22)])
def test_of_those_that_fit_and_are_as_fast_as_the_fastest_the_choice_moves_least(chip, length: int) -> None:
    problem = dataclasses.replace(LONG, length=length)
    memory = chip.hbm_bytes / 4
    picked = choose(problem, chip, memory=memory)
    fitting = [x for x in estimates(problem, chip) if x.refused is None and x.memory <= memory]
    fastest = min(x.time for x in fitting)
    assert picked.time <= 1.02 * fastest
    assert picked.moved == min(x.moved for x in fitting if x.time <= 1.02 * fastest)


def test_where_nothing_fits_the_smallest_is_taken() -> None:
    smallest = min(x.memory for x in estimates(LONG, V5P) if x.refused is None)
    assert choose(LONG, V5P, memory=1.0).memory == smallest


def test_gathering_stops_where_its_buffers_no_longer_fit() -> None:
    v5e = CHIPS["v5e"]
    assert estimate(LONG, "gather", v5e).memory > v5e.hbm_bytes / 4
    assert choose(LONG, v5e).scheme != "gather"


def test_the_table_has_a_line_per_scheme_and_marks_the_choice() -> None:
    lines = table(LONG, V5P).splitlines()
    assert [line[2:].split()[0] for line in lines[2:]] == list(SCHEMES)
    marked = [line[2:].split()[0] for line in lines[2:] if line.startswith("*")]
    assert marked == [choose(LONG, V5P).scheme]
    assert "cannot be dealt out" in next(line for line in lines if line[2:].startswith("ulysses "))


def test_heads_that_fit_no_scheme_and_unknown_schemes_are_refused() -> None:
    with pytest.raises(UserError, match="6 attention heads cannot be dealt out over tensor=4"):
        choose(Problem(1, 64, 6, 2, 8, ring=2, tensor=4), V5P)
    with pytest.raises(UserError, match="'all'; there are"):
        estimate(LONG, "all", V5P)


def test_rows_are_those_that_one_group_of_ranks_works_on(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Problem] = []
    monkeypatch.setattr(cost, "_picked", lambda problem, kind: found.append(problem) or "ring")
    query, key = jnp.zeros((16, 16, 4, 4)), jnp.zeros((16, 16, 2, 4))
    with make_layout({"fsdp": 2, "ring": 2, "expert": 2}).activate():
        assert pick_scheme(query, key) == "ring"
    assert found == [Problem(4, 16, 4, 2, 4, ring=2, item=4)]


def test_devices_without_figures_gather_and_say_so_once(caplog: pytest.LogCaptureFixture) -> None:
    query, key = jnp.zeros((2, 16, 4, 4)), jnp.zeros((2, 16, 2, 4))
    with make_layout({"ring": 4, "fsdp": 2}).activate(), caplog.at_level(logging.INFO, "vlpjax.parallel"):
        assert {pick_scheme(query, key) for _ in range(3)} == {"gather"}
    assert len([record for record in caplog.records if "no figures of 'cpu'" in record.getMessage()]) == 1
