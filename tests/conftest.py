"""What holds for all tests: eight simulated devices, one cache of compiled programs, and nothing left out.

The environment is set before JAX is imported, and programs that a test starts inherit it.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from xdist.scheduler import LoadFileScheduling

from vlpjax.flags import order_simulated_devices

CACHE = Path(__file__).resolve().parents[1] / ".cache"
DEVICES = "--xla_force_host_platform_device_count"

os.environ["JAX_PLATFORMS"] = "cpu"
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}=8".strip()
order_simulated_devices()
# Programs here run for a moment, if at all: what makes them fast would take most of the time.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "compiled"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")

hypothesis.settings.register_profile("house", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("house")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option of ``make golden``."""
    parser.addoption(
        "--write-golden", action="store_true", help="write tests/golden anew instead of comparing"
    )


class ByFileOrExperiment(LoadFileScheduling):
    """A file's tests run in one process, for they share what they made; so do those of one experiment."""

    def _split_scope(self, nodeid: str) -> str:
        file, _, test = nodeid.partition("::")
        experiment = test.partition("[")[2] if file.endswith("test_experiments.py") else ""
        return experiment or str(super()._split_scope(nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The experiments, half of all the work, are divided over the processes."""
    return ByFileOrExperiment(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.fixture
def write_golden(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are written instead of compared."""
    return bool(request.config.getoption("--write-golden"))


@pytest.fixture
def compiled_anew() -> Iterator[None]:
    """No program comes from the cache, which would not say what the compiler says."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # which remembers whether it is used
    yield
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


def left_out(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why a test counts as left out, or nothing: it was skipped, or is expected to fail."""
    if hasattr(report, "wasxfail"):
        return f"marked as an expected failure: {report.wasxfail}"
    if report.outcome == "skipped":
        return f"skipped: {report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr}"
    return ""


def refuse(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turns what was left out into a failure: a check that does not run must not look like one that passed."""
    if reason := left_out(report):
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} was left out ({reason}); a test here runs or is removed."
        vars(report).pop("wasxfail", None)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Refuses skipped and xfailed tests."""
    report = yield
    refuse(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Refuses skipped files."""
    report = yield
    refuse(report)
    return report
