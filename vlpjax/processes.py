"""Several processes: how they find one another, and how they go on together or end together."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

from vlpjax.errors import UserError

_PATIENCE_SECONDS = 1800  # that a process may take longer than the fastest
_round = itertools.count()

JOIN_SECONDS = 300  # that processes may be started apart
CLUSTERS = "Slurm, Open MPI, MPI (mpi4py), Kubernetes and Cloud TPU"  # https://docs.jax.dev/en/latest/multi_process.html


def join(
    coordinator: str = "", num_processes: str = "", process_id: str = "", join_seconds: str = ""
) -> None:
    """Makes this process one of several, as the command line says; without a coordinator it stays alone.

    To be called before JAX makes its first device.

    Args:
      coordinator: ``HOST:PORT`` of process 0, or ``"auto"`` where the cluster is one that JAX detects.
      num_processes, process_id: numbers, which ``"auto"`` finds by itself.
      join_seconds: how long to wait for the others.

    Raises:
      UserError: only some of the three are given, they do not fit, no cluster is there, or the others do not come.
    """
    given = {"num_processes": num_processes, "process_id": process_id}
    patience = _number("join_seconds", join_seconds) if join_seconds else JOIN_SECONDS
    if not coordinator:
        for name, text in (given | {"join_seconds": join_seconds}).items():
            if text:
                raise UserError(
                    f"--{name}={text} is given without --coordinator; write --coordinator=HOST:PORT, that of process 0."
                )
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if coordinator == "auto":
        for name, text in given.items():
            if text:
                raise UserError(f"--coordinator=auto finds --{name} by itself; leave --{name}={text} out.")
        _initialize(patience)
        return
    if not re.fullmatch(r"[^\s:]+:\d+|\[[\da-fA-F:]+\]:\d+", coordinator):
        raise UserError(f"--coordinator is {coordinator!r}; it is HOST:PORT of process 0, or auto.")
    for name, text in given.items():
        if not text:
            raise UserError(f"--coordinator={coordinator} needs --{name}=NUMBER too, which is missing.")
    count, index = (_number(name, text) for name, text in given.items())
    if index >= count:
        raise UserError(
            f"--process_id={index} is none of --num_processes={count}; the processes are 0 to {count - 1}."
        )
    if index:
        _reach(coordinator, index, patience)
    _initialize(patience, coordinator_address=coordinator, num_processes=count, process_id=index)


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise UserError(f"--{name} is {text!r}; it is a whole number.")
    return int(text)


def _reach(coordinator: str, index: int, patience: int) -> None:
    """Waits until somebody listens there: JAX would end this process with a page of traces if nobody does."""
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + patience
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
                return
        except (OSError, OverflowError) as error:
            if time.monotonic() >= deadline:
                raise UserError(
                    f"Process {index} found no coordinator at {coordinator} within {patience} s ({error}); is process "
                    "0 running on that host, and is the port open?"
                ) from error
        time.sleep(0.2)


def _initialize(patience: int, **explicit: Any) -> None:
    """``jax.distributed.initialize``, with its errors as sentences."""

    def give_up() -> None:
        print(
            f"error: The processes did not all come within {patience} s; look at the output of the others, or wait "
            "longer (--join_seconds).",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)  # JAX waits in C++, and would abort the process with a page of traces

    waiting = threading.Timer(patience, give_up)
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(**explicit, initialization_timeout=patience + 60)
    except ValueError as error:
        if explicit:
            raise UserError(f"The processes cannot join: {error}") from error
        raise UserError(
            f"--coordinator=auto found no cluster here; JAX detects {CLUSTERS}.  Elsewhere, give "
            "--coordinator=HOST:PORT --num_processes=N --process_id=I."
        ) from error
    except RuntimeError as error:
        raise UserError(f"The processes cannot join: {' '.join(str(error).split())}") from error
    finally:
        waiting.cancel()


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """What fails inside the block in one process fails in all of them, so that none waits for one that is gone.

    All processes must come to the end of the block.  A single process passes through.

    Raises:
      UserError: the sentence of the first process that failed, in those that did not fail themselves.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        problem = error
    if jax.process_count() > 1:
        told = _gathered("" if problem is None else _sentence(problem))
        if problem is None:
            for index, sentence in enumerate(told):
                if sentence:
                    raise UserError(f"{sentence} (said by process {index} of {len(told)})")
    if problem is not None:
        raise problem


def _sentence(problem: Exception) -> str:
    return str(problem) if isinstance(problem, UserError) else f"{type(problem).__name__}: {problem}"


def _gathered(text: str) -> list[str]:
    """The texts of all processes, through the store of the coordinator: no device and no program is needed."""
    from jax._src.distributed import global_state  # JAX has no public name for it

    assert global_state.client is not None, "there are several processes, so one of them coordinates"
    client, place = global_state.client, f"vlpjax/agreed/{next(_round)}"
    client.key_value_set(f"{place}/{jax.process_index()}", f"said:{text}")  # the store takes no empty text
    told = []
    for index in range(jax.process_count()):
        try:
            told.append(client.blocking_key_value_get(f"{place}/{index}", _PATIENCE_SECONDS * 1000))
        except RuntimeError as error:
            raise UserError(
                f"Process {index} of {jax.process_count()} said nothing for {_PATIENCE_SECONDS} s; look at its output."
            ) from error
    return [said.removeprefix("said:") for said in told]
