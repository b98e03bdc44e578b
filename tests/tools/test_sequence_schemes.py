"""Sequence schemes by length: a table without a compiler, and a choice that is near the fastest everywhere."""

from __future__ import annotations

import pytest

from tools.sequence_schemes import LENGTHS, main

CONFIG = "--config=experiments/decoders/long_video.py:paper"


def test_at_every_length_the_picked_scheme_is_at_most_five_percent_slower_than_the_fastest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([CONFIG]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    picked = [line for line in lines if "slower than the fastest" in line]
    assert [int(line.split()[0].replace(",", "")) for line in picked] == list(LENGTHS)
    assert all("*" in line for line in picked)
    for line in picked:
        assert float(line.partition("%")[0].split()[-1]) <= 5
    # 256 ranks are more than there are heads.
    refused = [line for line in lines if "cannot be dealt out" in line]
    assert refused and "2,097,152" in refused[-1]


def test_longer_rows_cost_what_their_pairs_cost(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([CONFIG, "--lengths=131072,262144", "--chip=v6e"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " ring " in line]
    first, second = (float(line.partition(" ring ")[2].split()[3]) for line in lines)
    # ms per layer and chip, at twice the keys for each query
    assert second / first == pytest.approx(2, rel=0.1)


def test_mistakes_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([CONFIG, "--tower=text"]) == 2
    assert "no tower 'text'; there are" in capsys.readouterr().err
    assert main([CONFIG, "--tower=image"]) == 2
    assert "is no decoder" in capsys.readouterr().err
    assert main([CONFIG, "--lengths=100000"]) == 2
    assert "100000 tokens does not divide into 8192" in capsys.readouterr().err
    assert main([CONFIG, "--chip=v99"]) == 2
    assert "chip 'v99'" in capsys.readouterr().err
