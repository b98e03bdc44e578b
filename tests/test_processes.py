"""Several processes find one another, each reads its own part of the data, and who stays away is told."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.processes_tiny import BATCH, STEPS
from tests.tiny import ROOT
from vlpjax.errors import UserError
from vlpjax.processes import join

LIMIT = 120.0  # seconds that anything here may take
FIRST_PORT, PORTS = 65535 - 2**12 + 1, 2**12  # of those that JAX takes by the job's number


def free_port(low: int = 0) -> int:
    """A port that nobody listens at; with ``low``, one that is not below it."""
    for port in range(low, low + PORTS) if low else [0]:
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
            found: int = free.getsockname()[1]
            return found
    raise OSError("no port is free")


def together(*processes: tuple[list[str], dict[str, str]], devices: int = 2) -> list[tuple[int, str, str]]:
    """Runs the program with these arguments and variables at the same time; how each ended and what it said."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    base = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.processes_tiny", *arguments],
            cwd=ROOT, env=base | variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for arguments, variables in processes
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=LIMIT) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(running, said, strict=True)]


def by_arguments(count: int) -> Iterator[tuple[list[str], dict[str, str]]]:
    port = free_port()
    for index in range(count):
        yield [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={index}"], {}


def by_slurm(count: int) -> Iterator[tuple[list[str], dict[str, str]]]:
    """What ``srun`` tells its tasks."""
    job = free_port(FIRST_PORT) - FIRST_PORT
    for index in range(count):
        yield (
            ["--coordinator=auto"],
            {
                "SLURM_JOB_ID": str(job + PORTS),
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_STEP_NUM_NODES": "1",
                "SLURM_NTASKS": str(count),
                "SLURM_PROCID": str(index),
                "SLURM_LOCALID": str(index),
            },
        )


def by_open_mpi(count: int) -> Iterator[tuple[list[str], dict[str, str]]]:
    """What ``mpirun`` tells its ranks."""
    job = free_port(FIRST_PORT) - FIRST_PORT
    for index in range(count):
        yield (
            ["--coordinator=auto"],
            {
                "OMPI_MCA_orte_hnp_uri": f"{job * 2**12}.0;tcp://127.0.0.1:34911",
                "OMPI_COMM_WORLD_SIZE": str(count),
                "OMPI_COMM_WORLD_RANK": str(index),
                "OMPI_COMM_WORLD_LOCAL_RANK": str(index),
            },
        )


@pytest.mark.parametrize(
    ("way", "count"), [(by_arguments, 2), (by_arguments, 4), (by_slurm, 2), (by_open_mpi, 2)]
)
def test_each_process_reads_the_rows_of_its_devices_and_all_see_the_whole_batch(way: Any, count: int) -> None:
    said: list[dict[str, Any]] = []
    for code, output, errors in together(*way(count)):
        assert code == 0, errors
        said.append(json.loads(output.splitlines()[-1]))  # after what Gloo says
    assert [one["process"] for one in said] == list(range(count))
    assert all((one["processes"], one["devices"]) == (count, 2 * count) for one in said)
    everything = list(range(BATCH * STEPS))
    share = BATCH // count
    for one in said:
        rows = [row for row in everything if row % BATCH // share == one["process"]]
        assert sorted(set(one["asked"])) == rows
    whole = [float(sum(everything[step * BATCH : (step + 1) * BATCH])) for step in range(STEPS)]
    assert all(one["sums"] == whole for one in said)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("", "2", "0"), ["--num_processes=2", "without --coordinator", "HOST:PORT"]),
        (("", "", "1"), ["--process_id=1", "without --coordinator"]),
        (("auto", "2", ""), ["--coordinator=auto", "leave --num_processes=2 out"]),
        (("here", "2", "0"), ["'here'", "HOST:PORT", "auto"]),
        (("here:port", "2", "0"), ["'here:port'"]),
        (("here:1", "", "0"), ["--coordinator=here:1 needs --num_processes"]),
        (("here:1", "2", ""), ["--coordinator=here:1 needs --process_id"]),
        (("here:1", "two", "0"), ["--num_processes is 'two'", "whole number"]),
        (("here:1", "2", "-1"), ["--process_id is '-1'", "whole number"]),
        (("here:1", "2", "2"), ["--process_id=2", "--num_processes=2", "0 to 1"]),
        (("here:1", "2", "0", "soon"), ["--join_seconds is 'soon'"]),
    ],
)
def test_arguments_that_do_not_fit_are_told(arguments: tuple[str, ...], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        join(*arguments)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_a_coordinator_that_is_not_there_is_waited_for_and_told() -> None:
    begin = time.monotonic()
    with pytest.raises(
        UserError, match=r"Process 1 found no coordinator at 127.0.0.1:\d+ within 1 s \(.*refused"
    ):
        join(f"127.0.0.1:{free_port()}", "2", "1", "1")
    assert 1 <= time.monotonic() - begin < 30


def test_who_is_alone_is_told() -> None:
    """A coordinator to whom nobody comes, and a process that is to find a cluster where there is none."""
    arguments = [
        f"--coordinator=127.0.0.1:{free_port()}",
        "--num_processes=2",
        "--process_id=0",
        "--join_seconds=2",
    ]
    (code, _, alone), (other, _, nowhere) = together((arguments, {}), (["--coordinator=auto"], {}))
    assert (code, other) == (2, 1)
    assert "error: The processes did not all come within 2 s" in alone
    assert "error: --coordinator=auto found no cluster here; JAX detects Slurm, Open MPI" in nowhere
    assert "Traceback" not in alone + nowhere


def test_without_a_coordinator_a_process_stays_alone() -> None:
    join()
