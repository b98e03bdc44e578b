"""Metric files of a run: ``metrics.jsonl`` (reproducible values), ``timing.jsonl`` (clock) and TensorBoard.

Values that depend on the clock never enter ``metrics.jsonl``, and a resumed run first removes what was
written after its checkpoint, so that a run which was killed and resumed ends with the same bytes as one that
was not.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlpjax.errors import UserError

# JSON has no literal for these; strings keep every line readable by any JSON parser.
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TENSORBOARD_FLUSH_SECONDS = 10.0


class MetricWriter:
    """Writes the metrics of one run; only the process with ``enabled=True`` touches the disk.

    Args:
        workdir: directory of the run; created when missing.
        resume_step: step of the checkpoint that the run continues from: lines of later steps are removed.
            ``None`` starts afresh: metric, timing and TensorBoard files that are already there are emptied.
        enabled: whether this process writes (process 0 does).

    Raises:
        UserError: a metric file is damaged before its last line, or the disk is full.
    """

    def __init__(
        self, workdir: str | os.PathLike[str], resume_step: int | None, *, enabled: bool = True
    ) -> None:
        self._metrics: _LineFile | None = None
        self._timing: _LineFile | None = None
        self._tensorboard: _TensorBoard | None = None
        if not enabled:
            return
        workdir = Path(workdir)
        with disk_full_is_told(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
        self._metrics = _LineFile(workdir / "metrics.jsonl", resume_step)
        self._timing = _LineFile(workdir / "timing.jsonl", resume_step)
        self._tensorboard = _TensorBoard(workdir / "tensorboard", resume_step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line of reproducible scalars (anything that ``float`` accepts) to ``metrics.jsonl``."""
        if self._metrics is not None and self._tensorboard is not None:
            scalars = _scalars(values)
            self._metrics.append(step, scalars)
            self._tensorboard.append(step, scalars)

    def timing(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line of wall-clock scalars to ``timing.jsonl`` (in TensorBoard ``timing/...``)."""
        if self._timing is not None and self._tensorboard is not None:
            scalars = _scalars(values)
            self._timing.append(step, scalars)
            self._tensorboard.append(step, {f"timing/{name}": value for name, value in scalars.items()})

    def sync(self) -> None:
        """Forces all lines to the disk; call it before a checkpoint is written.

        Without it a power cut could keep a checkpoint and lose metric lines that came before it, which no
        resume would write again.
        """
        for file in (self._metrics, self._timing, self._tensorboard):
            if file is not None:
                file.sync()

    def close(self) -> None:
        """Closes the files; further writes are ignored.  Safe to call twice."""
        files = (self._metrics, self._timing, self._tensorboard)
        self._metrics = self._timing = self._tensorboard = None
        for file in files:
            if file is not None:
                file.close()

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads a metric file: one dict per line, with ``"nan"`` and ``"inf"`` restored to floats.

    A last line that was cut short by a kill is left out; a missing file is an empty list.

    Raises:
        UserError: a line other than the last is not JSON.
    """
    path = Path(path)
    if not path.exists():
        return []
    return [{name: _restore(value) for name, value in record.items()} for record, _ in _records(path)]


def _scalars(values: Mapping[str, Any]) -> dict[str, float | int]:
    if "step" in values:
        raise ValueError("a metric may not be called 'step': the step is an argument of its own.")
    return {name: _scalar(values[name]) for name in sorted(values)}


def _scalar(value: Any) -> float | int:
    return int(value) if isinstance(value, int) else float(value)


def _encode(value: float | int) -> float | int | str:
    return value if math.isfinite(value) else repr(value)


def _restore(value: Any) -> Any:
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def _records(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yields each whole record of a JSON-lines file with the bytes of its line, including the line end."""
    lines = path.read_bytes().split(b"\n")
    last = max((number for number, line in enumerate(lines) if line.strip()), default=-1)
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            if number == last:  # A kill can only cut the last line.
                return
            raise UserError(
                f"{path} line {number + 1} is not JSON; remove the line, or delete the file to begin it anew."
            ) from None
        if not isinstance(record, dict):
            raise UserError(f"{path} line {number + 1} is {record!r}, not a JSON object with a 'step'.")
        yield record, line + b"\n"


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a write failed because nothing more fits: on the disk, in a quota, or below a limit for files.

    Libraries in C++ pass on the system's words instead of its number, or wrap one error into another.
    """
    while error is not None:
        text = str(error)
        if getattr(error, "errno", None) in _FULL or any(os.strerror(code) in text for code in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def disk_full_is_told(path: Path) -> Iterator[None]:
    """Turns "no space left" inside the block into a ``UserError`` that names ``path``."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise UserError(
            f"No space left on the disk while writing {path}; free some, then run the same command to resume."
        ) from error


class _LineFile:
    """A JSON-lines file, appended to without buffering: a kill loses at most a part of one line."""

    def __init__(self, path: Path, resume_step: int | None) -> None:
        self._path = path
        with disk_full_is_told(path):
            if resume_step is None:
                path.write_bytes(b"")
            elif path.exists():
                _drop_after(path, resume_step)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def append(self, step: int, scalars: Mapping[str, float | int]) -> None:
        record = {"step": int(step)} | {name: _encode(value) for name, value in scalars.items()}
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        size = os.fstat(self._descriptor).st_size
        with disk_full_is_told(self._path):
            try:
                while line:
                    line = line[os.write(self._descriptor, line) :]
            except OSError:
                os.ftruncate(self._descriptor, size)  # Leave whole lines behind.
                raise

    def sync(self) -> None:
        with disk_full_is_told(self._path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


def _drop_after(path: Path, step: int) -> None:
    """Rewrites ``path`` without the lines of later steps: whole new file first, then one rename."""
    kept = b"".join(line for record, line in _records(path) if record["step"] <= step)
    temporary = path.with_name(path.name + ".partial")
    with open(temporary, "wb") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class _TensorBoard:
    """Scalar events, written by the calling thread.

    tensorboardX's ``SummaryWriter`` hands events to a background thread; when that thread dies of a full disk
    its queue blocks the training loop for ever.  Its record format is used here directly instead.
    """

    def __init__(self, directory: Path, resume_step: int | None) -> None:
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        with disk_full_is_told(directory):
            directory.mkdir(parents=True, exist_ok=True)
            if resume_step is None:
                for old in directory.glob("events.out.tfevents.*"):
                    old.unlink()
            # TensorBoard reads files in the order of their names; the usual name ends in the host's name.
            self._path = directory / f"events.out.tfevents.{time.time_ns() // 1000}"
            self._writer = RecordWriter(str(self._path))
        self._flushed = -math.inf
        self._add(self._event(wall_time=time.time(), file_version="brain.Event:2"))
        if resume_step is not None:  # TensorBoard hides what earlier files hold from this step on.
            restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(self._event(wall_time=time.time(), step=resume_step + 1, session_log=restart))

    def append(self, step: int, scalars: Mapping[str, float | int]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._add(self._event(wall_time=time.time(), step=int(step), summary=self._summary(value=values)))

    def _add(self, event: Any) -> None:
        with disk_full_is_told(self._path):
            self._writer.write(event.SerializeToString())
            if time.monotonic() - self._flushed > _TENSORBOARD_FLUSH_SECONDS:
                self._writer.flush()
                self._flushed = time.monotonic()

    def sync(self) -> None:
        with disk_full_is_told(self._path):
            self._writer.flush()

    def close(self) -> None:
        with disk_full_is_told(self._path):
            self._writer.close()
