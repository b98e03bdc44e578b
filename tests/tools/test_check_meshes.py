"""``tools/check_meshes.py``: every mesh is tried, what differs is seen, what cannot be is told with its reason."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from tools import check_meshes

EXPERIMENT = """
from tests.tiny import run_config

def get_config():
    config = run_config()
    config.towers.image.heads = 1
    config.towers.text.heads = 1
    return config
"""


def test_every_product_of_eight_over_five_axes():
    found = list(check_meshes.meshes(("replica", "fsdp", "ring", "ulysses", "tensor"), 8))
    assert len(found) == len({tuple(sizes.items()) for sizes in found}) == math.comb(7, 4)
    assert all(math.prod(sizes.values()) == 8 and 1 not in sizes.values() for sizes in found)
    assert list(check_meshes.meshes(("fsdp", "tensor"), 6)) == [
        {"tensor": 6}, {"fsdp": 2, "tensor": 3}, {"fsdp": 3, "tensor": 2}, {"fsdp": 6},
    ]  # fmt: skip


def test_the_largest_difference_is_found_where_it_is():
    grads = {
        "a": np.array([1.0, 2.0]),
        "b": {"kernel": np.array([4.0, -8.0])},
        "key": {"bias": np.array([1e-9])},
    }
    ours = {
        "a": np.array([1.0, 2.0]),
        "b": {"kernel": np.array([4.0, -7.0])},
        "key": {"bias": np.array([5e-9])},
    }
    loss, gradient, parameter = check_meshes._differences(
        ({"x": 1.1, "y": 2.0}, ours), ({"x": 1.0, "y": 2.0}, grads)
    )
    assert (loss, gradient, parameter) == (pytest.approx(0.1), 1 / 8, "b/kernel")


def test_meshes_of_an_experiment(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "tried.py").write_text(EXPERIMENT)
    line = [f"--config={tmp_path}/tried.py", "--devices=2", "--axes=fsdp,tensor"]
    assert check_meshes.main(line) == 0
    tensor, fsdp, last = capsys.readouterr().out.splitlines()
    assert tensor.startswith("tensor=2") and "heads" in tensor and "not possible" in tensor
    assert fsdp.startswith("fsdp=2") and "loss " in fsdp and "gradients " in fsdp
    assert last.endswith("allowed 1e-05")
    assert check_meshes.main([*line, "--tolerance=0"]) == 1
    assert check_meshes.main(["--config=x.py", "--devices=1"]) == 2
    assert "at least 2" in capsys.readouterr().err
