"""The README is true: its Python is run, its commands are run on a shortened schedule, its table is up to date."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.tiny import ROOT
from tools import launch
from tools.compare import read_proof
from vlpjax.config import Config, apply_overrides, build, load
from vlpjax.main import main
from vlpjax.trainer import train

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
SHORT = {
    "duration": "2 steps",
    "data.train.batch_size": "16",
    "towers.image.channels": "(8,8,8,8)",
    "towers.text.width": "32",
}


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


def commands() -> list[str]:
    lines = "\n".join(blocks("bash")).splitlines()
    return [line.partition("  #")[0].strip() for line in lines if line.strip()]


def shorten(config: Config) -> Config:
    """The same config with two small steps and no evaluation."""
    config.evaluators = {}
    return apply_overrides(config, list(SHORT.items()))


def pictures(folder: Path) -> None:
    """A folder of images with a captions file, as the README's own-data section wants it."""
    folder.mkdir()
    lines = ["file,caption"]
    for number in range(24):
        Image.new("RGB", (48, 40), (number * 10, 90, 160)).save(folder / f"{number}.png")
        lines.append(f"{number}.png,picture number {number}")
    (folder / "captions.csv").write_text("\n".join(lines))


@pytest.fixture
def namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """An empty namespace in a directory that has what the README's examples read."""
    pictures(tmp_path / "my_pictures")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(ROOT))
    return {}


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    assert {name for name, _ in BLOCKS} == {"bash", "console", "python", "text"}


def test_the_python_blocks_run_and_what_they_describe_trains(
    namespace: dict[str, Any], tmp_path: Path
) -> None:
    sources, experiment, objective, composed, views, _ = blocks("python")
    exec(sources, namespace)
    exec(experiment, namespace)
    config = shorten(namespace["get_config"]())
    assert int(train(config, str(tmp_path / "own_data")).step) == 2

    (tmp_path / "my_objective.py").write_text(objective)
    importlib.invalidate_caches()
    namespace["config"] = config
    exec(composed, namespace)
    config.objectives.predict.loss.width = 128
    state = train(config, str(tmp_path / "own_objective"))
    assert "predict_predictor" in state.params
    assert set(state.teachers) == {"ema"}

    exec(views, namespace)
    batch = build(config.data.train).batch(0, rows=[0, 1])
    assert batch["view1"].shape == batch["view2"].shape == (2, 32, 32, 3)
    assert (batch["view1"] != batch["view2"]).any()


def tiny_clip(folder: Path) -> None:
    """A folder of weights in the form of CLIP's."""
    from transformers import CLIPConfig, CLIPModel

    tower = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    text = dict(tower, vocab_size=64, max_position_embeddings=8, eos_token_id=63)
    image = dict(tower, image_size=8, patch_size=4)
    CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=8)).save_pretrained(folder)


def test_weights_go_in_and_out_as_written(namespace: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModel, CLIPVisionModelWithProjection

    tiny_clip(tmp_path / "clip-vit-base-patch32")
    exec(blocks("python")[-1], namespace)
    theirs, ours = (
        AutoModel.from_pretrained(tmp_path / name) for name in ("clip-vit-base-patch32", "my-clip")
    )
    assert {name: x.tolist() for name, x in theirs.state_dict().items()} == {
        name: x.tolist() for name, x in ours.state_dict().items()
    }
    programs = [line for line in commands() if line.startswith("python tools/") and "torch" in line]
    assert len(programs) == 2
    for line in programs:
        program = shlex.split(line.replace("FOLDER", "clip-vit-base-patch32"))
        tool = importlib.import_module(program[1].removesuffix(".py").replace("/", "."))
        assert tool.main(program[2:]) == 0
    _, loading = CLIPVisionModelWithProjection.from_pretrained(
        tmp_path / "my-tower", output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]


@pytest.mark.parametrize("command", [line for line in commands() if "tools/compare.py" in line])
def test_the_comparison_knows_what_to_compare(command: str) -> None:
    file, *options = shlex.split(command, comments=True)[2:]
    assert (ROOT / file).is_file()
    if not any(option.startswith("--seeds") for option in options):
        assert set(read_proof(ROOT / file)) >= {"against", "metrics"}


@pytest.mark.parametrize("command", [line for line in commands() if "tools/launch.py" in line])
def test_the_launcher_prints_a_job(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(shlex.split(command)[2:]) == 0
    printed = capsys.readouterr().out
    assert "vlpjax.main" in printed and "--config=experiments/contrastive/clip.py:paper" in printed


@pytest.mark.parametrize("command", [line for line in commands() if line.startswith("make ")])
def test_make_knows_its_targets(command: str) -> None:
    done = subprocess.run(
        [*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "vlpjax.main" in done.stdout or "pytest" in done.stdout


def test_the_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In order, because later ones read what earlier ones wrote."""
    monkeypatch.chdir(ROOT)
    programs = [shlex.split(line) for line in commands() if line.startswith("python -m vlpjax.main")]
    assert len(programs) >= 3
    for program in programs:
        arguments = [argument.replace("runs/", f"{tmp_path}/") for argument in program[3:]]
        arguments += [f"--config.{path}={value}" for path, value in SHORT.items()]
        arguments.append("--compilation_cache=")
        assert main(arguments) == 0, capsys.readouterr().err
    assert (tmp_path / "mine" / "report.html").is_file()
    assert "towers" in capsys.readouterr().out


def test_the_converter_runs_as_written(tmp_path: Path) -> None:
    (command,) = [line for line in commands() if "convert_webdataset" in line]
    pictures(tmp_path / "pictures")
    with tarfile.open(tmp_path / "shards-000.tar.gz", "w:gz") as tar:
        for number in range(4):
            (tmp_path / f"{number}.txt").write_text(f"picture number {number}")
            tar.add(tmp_path / "pictures" / f"{number}.png", f"{number}.png")
            tar.add(tmp_path / f"{number}.txt", f"{number}.txt")
    done = subprocess.run(
        [sys.executable, *shlex.split(command)[1:]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((tmp_path / "converted").glob("mine.array_record-*"))) == 8


def test_the_console_block_shows_what_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    shown = [text for text in blocks("console") if text.startswith("$ python -m vlpjax.main")]
    assert shown
    for text in shown:
        command, expected = text.split("\n", 1)
        assert main(shlex.split(command)[4:]) == 2
        assert capsys.readouterr().err == expected


def test_the_table_of_systems_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "tools/systems.py", "--check"], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_files_that_the_readme_links_to_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert missing == []


def test_every_config_leaf_that_the_readme_sets_exists() -> None:
    config = load(f"{ROOT}/experiments/quickstart.py")
    for path, value in re.findall(r"--config\.([\w.]+)=(\S+?)[`\s]", README):
        if "lerning" not in path:
            apply_overrides(config.copy_and_resolve_references(), [(path, value.strip("'\""))])
