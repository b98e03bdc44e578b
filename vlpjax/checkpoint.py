"""Checkpoints (Orbax): the state, the place in the data and the clock, written together or not at all.

The state is written in the background while training goes on.  It is restored onto any mesh: the target's
shardings decide where every leaf goes, not the mesh that wrote it.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from vlpjax.errors import UserError
from vlpjax.rules import tree_names
from vlpjax.state import TrainState


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
        with self._told(step):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(target), record=ocp.args.JsonRestore()
                ),
            )
        for name, want, got in zip(
            tree_names(abstract), jax.tree.leaves(abstract), jax.tree.leaves(restored.state), strict=True
        ):
            if want.shape != got.shape:
                raise UserError(
                    f"{self.directory / str(step)}: {name} has shape {got.shape}; the model wants {want.shape}."
                )
        return restored.state, restored.record

    def restore_params(self, step: int) -> dict[str, Any]:
        """The parameters of ``step`` on this machine's first device, whatever the rest of the state was."""
        with self._told(step):
            state = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore())
            ).state
        return state["params"]

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
            text = str(error)
            full = (
                getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text or "ENOSPC" in text
            )
            if full:
                raise UserError(
                    f"There is no space left for checkpoints in {self.directory}; free some and run the same command "
                    "again: it continues from the newest complete checkpoint."
                ) from error
            if step is not None:
                reason = next(iter(text.splitlines()), type(error).__name__)[:200]
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
    if not (Path(workdir) / "checkpoints").is_dir():
        raise UserError(f"There is no run with checkpoints in {workdir!r}.")
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        if checkpoints.latest is None:
            raise UserError(f"The run in {workdir!r} has no complete checkpoint yet.")
        return checkpoints.restore_params(checkpoints.latest)
    finally:
        checkpoints.close()
