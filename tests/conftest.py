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

from vlpjax.flags import simulate_devices

CACHE = Path(__file__).resolve().parents[1] / ".cache"

os.environ["JAX_PLATFORMS"] = "cpu"
simulate_devices(8)
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


def scope_of(nodeid: str) -> str:
    """What a test shares with others: its file, or in the file of all experiments its experiment."""
    file, _, test = nodeid.partition("::")
    experiment = test.partition("[")[2] if file.endswith("test_experiments.py") else ""
    return experiment or file


class ByScope(LoadFileScheduling):
    """Tests run in one process with those that share something; experiments are divided over the processes."""

    def _split_scope(self, nodeid: str) -> str:
        return scope_of(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Divides the tests over the processes."""
    return ByScope(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Lets go of programs that no later test runs.

    Each kernel of a compiled program takes places in the process's memory map, which is full after 65,530 of them;
    XLA aborts then.
    """
    import jax

    if nextitem is None or scope_of(item.nodeid) != scope_of(nextitem.nodeid):
        jax.clear_caches()


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
