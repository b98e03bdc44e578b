"""Checkpoints (Orbax): the state, the place in the data and the clock, written together or not at all.

The state is written in the background while training goes on.  It is restored onto any mesh: the target's
shardings decide where every leaf goes, not the mesh that wrote it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from vlpjax.errors import UserError
from vlpjax.observe.metrics import is_disk_full
from vlpjax.rules import tree_names
from vlpjax.state import TrainState


def _is_news(record: logging.LogRecord) -> bool:
    """Whether Orbax's log says what nobody else will: a full disk is raised as well, and told in a sentence."""
    return not (record.exc_info and is_disk_full(record.exc_info[1]))


logging.getLogger("absl").addFilter(_is_news)


class Checkpoints:
    """The checkpoints of one run, in ``<workdir>/checkpoints/<step>``.

    Args:
      workdir: of the run.
      keep: how many of the newest stay.
      read_only: for a run that somebody else writes.
    """

    def __init__(self, workdir: str | Path, keep: int = 2, read_only: bool = False):
        self.directory = Path(workdir).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
        )
        with self._told():
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    @property
    def latest(self) -> int | None:
        """The newest step that was written completely; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, record: dict[str, Any]) -> None:
        """Starts to write; returns when the state's memory may be reused.

        Args:
          step: finished steps.
          state: sharded or not.
          record: JSON-like: the data's place and the clock.

        Raises:
          UserError: the disk is full, now or since the last save; older checkpoints are untouched.
        """
        with self._told():
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)),
                force=True,
            )

    def restore(
        self, step: int, abstract: TrainState, shardings: TrainState
    ) -> tuple[TrainState, dict[str, Any]]:
        """State and record of ``step``, the state laid out as ``shardings`` say.

        Raises:
          UserError: the checkpoint is damaged, or of another model.
        """
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract,
            shardings,
        )
        self._check_same(step, abstract)
        with self._told(step):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(target), record=ocp.args.JsonRestore()
                ),
            )
        return restored.state, restored.record

    def _check_same(self, step: int, abstract: TrainState) -> None:
        """Whether a checkpoint holds this state, by names and shapes; Orbax would not say which leaf is another."""
        folder = self.directory / str(step)
        with self._told(step):
            stored = ocp.StandardCheckpointHandler().metadata(folder / "state").tree
        have = {
            name: tuple(leaf.shape)
            for name, leaf in zip(tree_names(stored), jax.tree.leaves(stored), strict=True)
        }
        leaves = zip(tree_names(abstract), jax.tree.leaves(abstract), strict=True)
        want = {name: tuple(leaf.shape) for name, leaf in leaves}
        for name in sorted(want.keys() | have.keys()):
            if name not in have:
                raise UserError(f"{folder} has no {name}; the model wants one of shape {want[name]}.")
            if name not in want:
                raise UserError(f"{folder} has {name} of shape {have[name]}, and this model has none.")
            if want[name] != have[name]:
                raise UserError(f"{folder}: {name} has shape {have[name]}; the model wants {want[name]}.")

    def restore_params(self, step: int) -> dict[str, Any]:
        """The parameters of ``step`` on this machine's first device, whatever the rest of the state was."""
        params: dict[str, Any] = self._restore_fields(step)["params"]
        return params

    def restore_variables(self, step: int, params: str = "student") -> dict[str, Any]:
        """Flax variables of ``step``, likewise: the student's, or a teacher's where it has its own towers.

        Raises:
          UserError: there is no such teacher.
        """
        state = self._restore_fields(step)
        chosen = state["params"]
        teachers = state.get("teachers") or {}
        if params != "student":
            if params not in teachers:
                known = ", ".join(map(repr, ("student", *teachers)))
                raise UserError(
                    f"{self.directory / str(step)} has no parameters of {params!r}; there are {known}."
                )
            chosen = {**chosen, **teachers[params]}
        statistics = state.get("statistics") or {}
        return {"params": chosen} | ({"batch_stats": statistics} if statistics else {})

    def _restore_fields(self, step: int) -> dict[str, Any]:
        """The whole state on this process's first device, whichever devices saved it."""
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        with self._told(step):
            stored = ocp.StandardCheckpointHandler().metadata(self.directory / str(step) / "state").tree
            target = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), stored
            )
            state: dict[str, Any] = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
            ).state
        return state

    def wait(self) -> None:
        """Until everything that was started is on disk."""
        with self._told():
            self._manager.wait_until_finished()

    def close(self) -> None:
        with self._told():
            self._manager.close()

    @contextlib.contextmanager
    def _told(self, step: int | None = None) -> Iterator[None]:
        """Turns what goes wrong on the disk into one sentence."""
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            if isinstance(error, UserError):
                raise
            if is_disk_full(error):
                raise UserError(
                    f"There is no space left for checkpoints in {self.directory}; free some and run the same command "
                    "again: it continues from the newest complete checkpoint."
                ) from error
            if step is not None:
                reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
                raise UserError(
                    f"The checkpoint {self.directory / str(step)} cannot be read ({reason}); delete that folder to "
                    "continue from an older one."
                ) from error
            raise


def load_params(workdir: str) -> dict[str, Any]:
    """The newest parameters of the run in ``workdir``, to start from or to be taught by.

    Raises:
      UserError: there is no such run, or it has no checkpoint yet.
    """
    with _newest(workdir) as (checkpoints, step):
        return checkpoints.restore_params(step)


def load_variables(workdir: str, params: str = "student") -> dict[str, Any]:
    """The newest Flax variables of the run in ``workdir``: the student's, or those of the teacher ``params``.

    Raises:
      UserError: there is no such run or teacher, or no checkpoint yet.
    """
    with _newest(workdir) as (checkpoints, step):
        return checkpoints.restore_variables(step, params)


@contextlib.contextmanager
def _newest(workdir: str) -> Iterator[tuple[Checkpoints, int]]:
    if not (Path(workdir) / "checkpoints").is_dir():
        raise UserError(f"There is no run with checkpoints in {workdir!r}.")
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        if checkpoints.latest is None:
            raise UserError(f"The run in {workdir!r} has no complete checkpoint yet.")
        yield checkpoints, checkpoints.latest
    finally:
        checkpoints.close()
