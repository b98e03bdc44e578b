"""The shape of the house: imports point down, files have one subject and say which, nothing is left unfinished."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TREES = ("vlpjax", "data_pipelines", "experiments", "tools", "tests")
FILES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "setup.py", *(path for tree in TREES for path in sorted((ROOT / tree).rglob("*.py")))]
}
LIBRARY = {file: text for file, text in FILES.items() if file.startswith("vlpjax/")}

# The parts of vlpjax from top to bottom.  A part imports from the lines below its own only, never from its
# neighbours: this alone rules out every circle.
LAYERS = (
    ("main", "plans"),
    ("trainer", "describe", "exchange", "plan"),
    ("run",),
    ("step", "evaluators", "checkpoint", "workdir"),
    ("experiment", "state"),
    ("objectives", "teachers"),
    ("weights",),
    ("models",),
    ("parallel", "data"),
    ("optim", "observe", "mesh", "processes", "hardware", "planning", "flags"),
    ("config",),
    ("rules", "durations"),
    ("errors",),
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}

# Data modules run in worker processes, which must stay light; feeding devices is the one thing that needs JAX.
DATA_MODULES_WITH_JAX = ("vlpjax/data/feed.py",)
MOST_LINES = 600
MARKERS = (
    "to-do",
    "fix-me",
    "x-xx",
    "raise not-implemented-error",
)  # hyphens: this file must not name itself
UNFINISHED = re.compile(rf"\b({'|'.join(marker.replace('-', '') for marker in MARKERS)})\b", re.IGNORECASE)


def imported(text: str) -> Iterator[str]:
    """Full names of all that a file imports, at its top or inside its functions."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(file: str) -> str:
    """``"models"`` for ``vlpjax/models/vit.py``, ``"step"`` for ``vlpjax/step.py``."""
    return file.split("/")[1].removesuffix(".py")


def upward_imports(file: str, text: str) -> list[str]:
    """What a library file imports from its own layer or from above."""
    own = part_of(file)
    parts = {name.split(".")[1] for name in imported(text) if name.startswith("vlpjax.")}
    return sorted(part for part in parts - {own} if LEVEL[part] <= LEVEL[own])


def roots(text: str) -> set[str]:
    """Top-level packages that a file imports."""
    return {name.split(".")[0] for name in imported(text)}


def flaws(file: str, text: str) -> list[str]:
    """What is wrong with a file by itself."""
    found = []
    if not ast.get_docstring(ast.parse(text)):
        found.append("opens with no docstring that says what it is for")
    if text.count("\n") > MOST_LINES:
        found.append(f"has {text.count(chr(10))} lines, and {MOST_LINES} are the most")
    found += [f"holds {match[0]}" for match in UNFINISHED.finditer(text)]
    return found


def test_every_part_has_a_layer():
    found = {part_of(file) for file in LIBRARY} - {"__init__"}
    assert found <= set(LEVEL), f"give these a place in LAYERS: {sorted(found - set(LEVEL))}"


@pytest.mark.parametrize("part", LEVEL)
def test_imports_point_down(part):
    wrong = {
        file: up
        for file, text in LIBRARY.items()
        if part_of(file) == part and (up := upward_imports(file, text))
    }
    assert not wrong, f"these import from their own layer or from above: {wrong}"


def test_the_library_knows_nothing_around_it():
    outside = {"experiments", "data_pipelines", "tools", "tests"}
    wrong = {file: roots(text) & outside for file, text in LIBRARY.items() if roots(text) & outside}
    assert not wrong


def test_only_the_command_line_reads_experiments():
    others = {file: text for file, text in FILES.items() if not file.startswith("experiments/")}
    wrong = [file for file, text in others.items() if "experiments" in roots(text)]
    assert not wrong


def test_no_other_framework_in_the_training_process():
    wrong = [file for file, text in LIBRARY.items() if roots(text) & {"tensorflow", "torch", "apache_beam"}]
    assert not wrong


def test_data_workers_do_not_load_jax():
    wrong = [
        file
        for file, text in LIBRARY.items()
        if part_of(file) == "data"
        and file not in DATA_MODULES_WITH_JAX
        and roots(text) & {"jax", "flax", "optax"}
    ]
    assert not wrong


@pytest.mark.parametrize("tree", ["setup.py", *TREES])
def test_files_are_whole(tree):
    wrong = {
        file: found
        for file, text in FILES.items()
        if file.split("/")[0] == tree and (found := flaws(file, text))
    }
    assert not wrong


def test_these_checks_can_fail():
    assert upward_imports("vlpjax/models/vit.py", "from vlpjax.trainer import train") == ["trainer"]
    assert upward_imports("vlpjax/models/vit.py", "def f():\n    import vlpjax.step") == ["step"]
    assert upward_imports("vlpjax/models/vit.py", "from vlpjax import objectives") == ["objectives"]
    assert upward_imports("vlpjax/trainer.py", "from vlpjax.describe import describe") == ["describe"]
    assert upward_imports("vlpjax/models/vit.py", "from vlpjax.models.layers import Block") == []
    assert roots("def f():\n    import torch.nn as nn") == {"torch"}
    assert (
        len(flaws("a.py", f"x = 1  # {'to-do'.replace('-', '')}\n" * (MOST_LINES + 1))) == 2 + MOST_LINES + 1
    )
