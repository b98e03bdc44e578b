"""What is installed: the library with its data and notices, and a declaration of all that it imports."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools

import vlpjax

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "vlpjax" / "data" / "bundled"

# Where a distribution is not called what it is imported as.
DISTRIBUTION = {"PIL": "pillow", "absl": "absl-py", "orbax": "orbax-checkpoint"}


@pytest.fixture(scope="module")
def declared() -> dict[str, Any]:
    """The arguments that setup.py hands to setuptools."""
    found: dict[str, Any] = {}
    original, setuptools.setup = setuptools.setup, found.update
    try:
        runpy.run_path(str(ROOT / "setup.py"))
    finally:
        setuptools.setup = original
    return found


def normal(requirement: str) -> str:
    """The name of a requirement, in the form in which names are compared."""
    return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")


def third_party_imports() -> set[str]:
    """Top-level packages, from outside and not of Python itself, that the library imports."""
    names = set()
    for path in (ROOT / "vlpjax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add((node.module or "").split(".")[0])
    return names - set(sys.stdlib_module_names) - {"vlpjax"}


def test_the_version_stands_in_one_place(declared):
    assert declared["version"] == vlpjax.__version__
    assert importlib.metadata.version("vlpjax") == vlpjax.__version__, "install the checkout again"


def test_every_import_of_the_library_is_declared(declared):
    optional = [item for name in ("gguf", "plan") for item in declared["extras_require"][name]]
    required = {normal(item) for item in [*declared["install_requires"], *optional]}
    imported = {normal(DISTRIBUTION.get(name, name)) for name in third_party_imports()}
    assert imported <= required, (
        "add these to setup.py, or to DISTRIBUTION above if they are there by another name"
    )


PROVEN = ("cpu", "data", "torch", "gguf", "plan", "dev")  # the extras that `make test` installs


def test_constraints_hold_every_requirement_exactly(declared):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    exact = {normal(line): line for line in lines if not line.startswith("#")}
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!]+", line) for line in exact.values())
    extras = declared["extras_require"]
    proven = [*declared["install_requires"], *(item for name in PROVEN for item in extras[name])]
    assert {normal(item) for item in proven} <= set(exact)


def test_an_installed_package_holds_the_code_the_data_and_the_notices(tmp_path):
    build = [
        sys.executable,
        "setup.py",
        "-q",
        "egg_info",
        "--egg-base",
        tmp_path,
        "build",
        "--build-base",
        tmp_path,
    ]
    subprocess.run([*build, "--build-lib", tmp_path / "lib"], cwd=ROOT, check=True, capture_output=True)
    built = {path.relative_to(tmp_path / "lib") for path in (tmp_path / "lib").rglob("*") if path.is_file()}
    code = {path.relative_to(ROOT) for path in (ROOT / "vlpjax").rglob("*.py")}
    data = {path.relative_to(ROOT) for path in BUNDLED.rglob("*") if path.is_file()}
    assert built == code | data
    assert {"NOTICE", "emoji1594.spm.model"} <= {path.name for path in data}


def test_the_licence_is_whole():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "TERMS AND CONDITIONS" in text
    assert "END OF TERMS AND CONDITIONS" in text
