"""JSON files of a run that the report reads: where it ran, and the newest result of every evaluator."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Protocol

from vlpjax.observe.metrics import disk_full_is_told


class Scores(Protocol):
    """What is written of an evaluation."""

    @property
    def metrics(self) -> dict[str, float]: ...
    @property
    def chance(self) -> dict[str, float]: ...
    @property
    def examples(self) -> list[dict[str, Any]]: ...


def write_environment(workdir: str | os.PathLike[str], environment: dict[str, Any]) -> None:
    """Writes ``environment.json``."""
    _write(Path(workdir) / "environment.json", environment)


def write_evaluation(
    workdir: str | os.PathLike[str], name: str, title: str, step: int, scores: Scores, error: str = ""
) -> None:
    """Writes ``evaluations/<name>.json``, over the result of an earlier step."""
    record: dict[str, Any] = {
        "step": step,
        "title": title,
        "metrics": {
            key: value if math.isfinite(value) else str(value) for key, value in scores.metrics.items()
        },
        "chance": scores.chance,
        "examples": scores.examples,
    }
    if error:
        record["error"] = error
    _write(Path(workdir) / "evaluations" / f"{name}.json", record)


def _write(path: Path, value: Any) -> None:
    """All or nothing: a reader never sees half a file."""
    with disk_full_is_told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
        os.replace(temporary, path)
