"""Several processes find one another, read their own parts and train as one; who stays away is told."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.processes_tiny import BATCH, STEPS, source, train
from tests.tiny import ROOT, assert_trees_close, simulating
from vlpjax.checkpoint import load_params
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
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.processes_tiny", *arguments],
            cwd=ROOT, env=simulating(devices) | variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
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


def said_by(*processes: tuple[list[str], dict[str, str]]) -> list[dict[str, Any]]:
    """What processes say that all end well."""
    found = []
    for code, output, errors in together(*processes):
        assert code == 0, errors
        found.append(json.loads(output.splitlines()[-1]))  # after what Gloo says
    assert [one["process"] for one in found] == list(range(len(processes)))
    assert all((one["processes"], one["devices"]) == (len(processes), 2 * len(processes)) for one in found)
    return found


def test_processes_find_one_another_under_open_mpi() -> None:
    said_by(*by_open_mpi(2))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], Any]:
    """Losses and last parameters of one process with all devices."""
    workdir = tmp_path_factory.mktemp("alone")
    return train(str(workdir), source()), load_params(str(workdir))


@pytest.mark.parametrize(("way", "count"), [(by_slurm, 2), (by_arguments, 4)])
def test_processes_read_their_own_parts_and_train_and_save_as_one(
    alone: tuple[list[float], Any], tmp_path: Path, way: Any, count: int
) -> None:
    said = said_by(*(([*line, f"--workdir={tmp_path}"], env) for line, env in way(count)))
    share = BATCH // count
    for one in said:
        rows = [row for row in range(BATCH * STEPS) if row % BATCH // share == one["process"]]
        assert sorted(set(one["asked"])) == rows
        np.testing.assert_allclose(one["losses"], alone[0], rtol=1e-5)
    # A program with other devices than those that saved reads what they saved.
    assert_trees_close(load_params(str(tmp_path)), alone[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("", "2", "0"), ["--num_processes=2", "without --coordinator", "HOST:PORT"]),
        (("", "", "1"), ["--process_id=1", "without --coordinator"]),
        (("", "", "", "9"), ["--join_seconds=9", "without --coordinator"]),
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
