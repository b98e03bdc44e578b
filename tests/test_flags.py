"""What XLA is told through the environment, which has to be said before there are devices."""

from __future__ import annotations

import os

import pytest

from vlpjax.flags import SIMULATED, THREADS, simulate_devices

DEVICES = "--xla_force_host_platform_device_count=8"
ORDER, PATIENCE = SIMULATED
CHOSEN = "--xla_cpu_enable_concurrency_optimized_scheduler=true"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (DEVICES, f"{DEVICES} {ORDER} {PATIENCE}"),
        (f"{DEVICES} {ORDER} {PATIENCE}", f"{DEVICES} {ORDER} {PATIENCE}"),
        (f"{CHOSEN} {DEVICES}", f"{CHOSEN} {DEVICES} {PATIENCE}"),
        ("", ""),
    ],
)
def test_simulated_devices_take_their_collectives_in_one_order_and_wait(
    before: str, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_FLAGS", before)
    monkeypatch.delenv(THREADS)
    simulate_devices()
    assert os.environ["XLA_FLAGS"] == after
    assert os.environ.get(THREADS) == ("512" if DEVICES in before else None)


def test_the_tests_do() -> None:
    assert {ORDER, PATIENCE} <= set(os.environ["XLA_FLAGS"].split())
    assert int(os.environ[THREADS]) >= 8 * 8


def test_devices_are_simulated_where_nobody_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    for before, count in (("", 4), ("--xla_dump_to=x", 4), (DEVICES, 8)):
        monkeypatch.setenv("XLA_FLAGS", before)
        monkeypatch.delenv(THREADS, raising=False)
        simulate_devices(4)
        found = os.environ["XLA_FLAGS"]
        assert found.startswith(before) and found.count("device_count") == 1
        assert f"device_count={count} " in found and os.environ[THREADS] == str(64 * count)


def test_more_threads_than_somebody_chose_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", DEVICES)
    monkeypatch.setenv(THREADS, "9")
    simulate_devices()
    assert os.environ[THREADS] == "9"
