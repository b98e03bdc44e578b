"""Several processes that go on together or end together."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import jax

from vlpjax.errors import UserError

_PATIENCE_SECONDS = 1800  # that a process may take longer than the fastest
_round = itertools.count()


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
