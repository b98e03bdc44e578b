"""A trace covers the steps that were asked for, and none is left running."""

from __future__ import annotations

import jax
import pytest

from vlpjax.errors import UserError
from vlpjax.observe.profiling import parse_profile, trace


@pytest.fixture
def calls(monkeypatch):
    made = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda directory: made.append(("start", directory)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: made.append(("stop", None)))
    return made


def test_the_setting_is_read_or_refused():
    assert parse_profile("") is None
    assert parse_profile("10:15") == (10, 15)
    for wrong in ("10", "15:10", "3:3", "a:b"):
        with pytest.raises(UserError, match="config.profile"):
            parse_profile(wrong)


def test_the_trace_covers_its_steps(calls, tmp_path):
    seen = []
    with trace(tmp_path, (2, 4)) as profiler:
        for step in range(6):
            profiler.before(step)
            seen.append(len(calls))
    assert seen == [0, 0, 1, 1, 2, 2]
    assert calls == [("start", str(tmp_path / "profile")), ("stop", None)]


def test_a_failing_run_ends_its_trace(calls, tmp_path):
    with pytest.raises(RuntimeError), trace(tmp_path, (0, 9)) as profiler:
        profiler.before(0)
        raise RuntimeError
    assert [name for name, _ in calls] == ["start", "stop"]


def test_no_setting_no_trace(calls, tmp_path):
    with trace(tmp_path, None) as profiler:
        profiler.before(0)
    assert calls == []
