"""What XLA is told through the environment, which has to be said before there are devices."""

from __future__ import annotations

import os

import pytest

from vlpjax.flags import ONE_ORDER, order_simulated_devices

SIMULATED = "--xla_force_host_platform_device_count=8"
CHOSEN = "--xla_cpu_enable_concurrency_optimized_scheduler=true"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (SIMULATED, f"{SIMULATED} {ONE_ORDER}"),
        (f"{SIMULATED} {ONE_ORDER}", f"{SIMULATED} {ONE_ORDER}"),
        (f"{CHOSEN} {SIMULATED}", f"{CHOSEN} {SIMULATED}"),
        ("", ""),
    ],
)
def test_simulated_devices_take_their_collectives_in_one_order(
    before: str, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_FLAGS", before)
    order_simulated_devices()
    assert os.environ["XLA_FLAGS"] == after


def test_the_tests_do() -> None:
    assert ONE_ORDER in os.environ["XLA_FLAGS"]
