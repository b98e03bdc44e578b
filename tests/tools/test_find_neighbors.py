"""Lists of neighbours: what the tower's cosines say, never a record itself, and never one that cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from PIL import Image

from tests.tiny import unit
from tools import find_neighbors
from vlpjax.checkpoint import Checkpoints
from vlpjax.config import Config, spec, to_json
from vlpjax.data.sources import ImageFolder, WithNeighbors
from vlpjax.models.vit import ViT
from vlpjax.state import TrainState

TOWER: dict[str, Any] = dict(
    image_size=8, patch=4, width=16, depth=1, heads=2, mlp_ratio=2.0, pool="mean", class_tokens=0, embedding=6
)
COUNT, BROKEN = 12, 4
EXPERIMENT = """
from vlpjax.config import Config, spec
from vlpjax.data.pipeline import Pipeline
from vlpjax.data.sources import ImageFolder, WithNeighbors
from vlpjax.data.transforms import Decode, Normalize
from vlpjax.evaluators.knn import KNN
from vlpjax.evaluators.retrieval import Retrieval


def get_config():
    folder = spec(ImageFolder, directory={directory!r}, captions="folders")
    transforms = dict(decode=spec(Decode), normalize=spec(Normalize, range="-1..1"))
    config = Config(data=dict(train=spec(Pipeline)), evaluators=dict(knn=spec(KNN)))
    config.data.train.source = spec(WithNeighbors, source=folder, neighbors="not/there/yet.npy")
    config.evaluators.retrieval = spec(Retrieval, data=spec(Pipeline, source=folder, transforms=transforms))
    return config
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A folder of pictures of which one is broken, a run, an experiment; and the embeddings of the pictures."""
    folder = tmp_path_factory.mktemp("neighbors")
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 3), np.uint8)
    (folder / "pictures" / "noise").mkdir(parents=True)
    for at, one in enumerate(pixels):
        Image.fromarray(one).save(folder / "pictures" / "noise" / f"{at:02}.png")
    (folder / "pictures" / "noise" / f"{BROKEN:02}.png").write_bytes(b"no picture")
    (folder / "experiment.py").write_text(EXPERIMENT.format(directory=str(folder / "pictures")))
    tower, images = ViT(**TOWER), pixels.astype(np.float32) / 127.5 - 1
    params = meta.unbox(jax.jit(tower.init)(jax.random.key(0), images)["params"])
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text(
        to_json(Config(towers=dict(image=spec(ViT, **TOWER)), objectives={}))
    )
    state = TrainState(
        step=jnp.int32(1), params={"image": params}, optimizer={}, teachers={}, objectives={}, statistics={}
    )
    checkpoints = Checkpoints(folder / "run")
    checkpoints.save(1, state, {})
    checkpoints.wait()
    checkpoints.close()
    return folder, np.asarray(jax.jit(tower.apply)({"params": params}, images)["embedding"])


def run(folder: Path, *more: str) -> int:
    config = f"--config={folder / 'experiment.py'}"
    return find_neighbors.main([config, f"--workdir={folder / 'run'}", "--batch_size=8", *more])


def test_neighbours_are_those_of_the_cosines_and_a_source_reads_them(
    made: tuple[Path, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, embeddings = made
    out = tmp_path / "new" / "neighbors.npy"
    assert run(folder, f"--out={out}") == 0
    assert f"{out}: 3 neighbours of each of {COUNT} records" in capsys.readouterr().out
    table = np.load(out)
    cosines = unit(embeddings) @ unit(embeddings).T
    np.fill_diagonal(cosines, -np.inf)
    cosines[:, BROKEN] = -np.inf
    read = [at for at in range(COUNT) if at != BROKEN]
    np.testing.assert_array_equal(table[read], np.argsort(-cosines, axis=1)[read, :3])
    assert not np.any(table == np.arange(COUNT)[:, None]) and not np.any(table == BROKEN)
    pictures = ImageFolder(str(folder / "pictures"), captions="folders")
    source = WithNeighbors(pictures, str(out))
    assert source.locate(1, seed=0, shuffle=False)[1] in table[0]


def test_of_equal_pictures_none_is_its_own_neighbour() -> None:
    places = np.array([[1, 0, 2], [0, 2, 3], [2, 1, 0], [0, 1, 3]])
    np.testing.assert_array_equal(find_neighbors.without_self(places), [[1, 2], [0, 2], [1, 0], [0, 1]])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--out=neighbors.txt", "--out is 'neighbors.txt'; it ends in .npy."),
        ("--k=12", "--k is 12; each of 12 records has from 1 to 11 others."),
        ("--tower=images", "has no tower 'images'"),
        ("--evaluator=knn", "--evaluator names 'knn', which makes no images ready"),
    ],
)
def test_what_cannot_be_done_is_told(
    made: tuple[Path, np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    argument: str,
    message: str,
) -> None:
    assert run(made[0], f"--out={tmp_path / 'out.npy'}", argument) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
