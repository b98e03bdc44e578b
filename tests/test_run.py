"""A run made ready where its data is not: what the config declares stands for it, and must be true where it is."""

from __future__ import annotations

import re
from typing import Any

import pytest
from jax.sharding import PartitionSpec

from tests.tiny import BATCH, LENGTH, SIZE, STEPS, run_config
from vlpjax.config import Config, load, spec
from vlpjax.data.pipeline import Pipeline
from vlpjax.data.sources import WebDataset
from vlpjax.describe import describe
from vlpjax.errors import UserError
from vlpjax.run import Run

DECLARED = dict(
    example=dict(image=f"float32[{SIZE},{SIZE},3]", text=f"int32[{LENGTH}]", label="int32[]"),
    examples=64,
)


def declaring(**changes: Any) -> Config:
    config = run_config()
    for name, value in (DECLARED | changes).items():
        config.data[name] = value
    return config


def far(config: Config) -> Config:
    """The same run on data that is not on this machine."""
    config.data.train = spec(
        Pipeline, source=spec(WebDataset, tars="nowhere/{00000..41455}.tar"), transforms={}, batch_size=BATCH
    )
    return config


def test_declared_data_gives_the_shapes_and_the_length_that_the_data_itself_gives() -> None:
    there, declared = Run.from_config(declaring()), Run.from_config(far(declaring()), data=False)
    assert declared.batch_shapes == there.batch_shapes
    assert declared.batch_shapes["image"].shape == (BATCH, SIZE, SIZE, 3)
    assert declared.total_steps == there.total_steps == STEPS
    assert declared.experiment.durations == there.experiment.durations
    assert declared.abstract[0] == there.abstract[0]


def test_an_epoch_is_as_long_as_is_declared() -> None:
    config = far(declaring(examples=1600))
    config.duration = "2 epochs"
    assert Run.from_config(config, data=False).total_steps == 2 * 1600 // BATCH


def test_a_run_is_described_where_its_data_is_not() -> None:
    text = describe(far(declaring(examples=400_000_000)))
    assert f"image float32[{BATCH}, {SIZE}, {SIZE}, 3]" in text
    assert "epochs of 400,000,000" in text
    assert "compiled step" in text
    lines = [re.split(r"\s{2,}", line) for line in text.splitlines()]
    columns = ["parameter", "shape", "axes", "sharding", "bytes/device", "initial", "rate", "decay"]
    (kernel,) = [line for line in lines if line[0] == "image/block_0/attention/query/kernel"]
    row = dict(zip(columns, kernel, strict=True))
    assert columns in lines
    assert (row["shape"], row["axes"]) == ("16x2x8", "embed, heads, head_dim")
    assert (row["sharding"], row["bytes/device"]) == ("fsdp, -, -", str(4 * 16 * 2 * 8 // 8))
    assert (row["rate"], row["decay"]) == ("1", "1") and row["initial"].startswith("normal")
    rows = [line for line in lines[lines.index(columns) + 2 :] if len(line) == len(columns)]
    sizes = [int(line[4].replace(",", "")) for line in rows]
    (total,) = [line for line in lines if line[0] == "all"]
    assert total[2] == f"{sum(sizes):,}"


def test_frames_lie_over_the_sequence_ranks_that_divide_them() -> None:
    config = load("experiments/decoders/long_video.py")
    config.mesh.fsdp, config.mesh.ring, config.mesh.ulysses = 2, 2, 2
    places = Run.from_config(config).batch_shardings
    assert places["video"].spec == PartitionSpec(("fsdp",), ("ring", "ulysses"))
    assert places["tokens"].spec == places["index"].spec == PartitionSpec(("fsdp",))
    config.data.train.source.frames = 6
    assert Run.from_config(config).batch_shardings["video"].spec == PartitionSpec(("fsdp",), None)


def test_examples_that_are_declared_are_not_made() -> None:
    config = load("experiments/decoders/long_video.py:paper")
    shapes = Run.from_config(config, data=False).batch_shapes
    assert shapes["video"].shape == (1, 10_240, 384, 384, 3)  # 4.5 GB


def test_what_is_declared_and_is_not_so_is_told_where_the_data_is() -> None:
    config = declaring(example=dict(DECLARED["example"], text="int32[77]"))
    with pytest.raises(UserError, match=r"declares 'text' as int32\[77\], but the data has int32\[8\]"):
        _ = Run.from_config(config).batch_shapes
    config = declaring(example=dict(DECLARED["example"], depth="float32[4]"))
    with pytest.raises(UserError, match=r"declares 'depth' as float32\[4\], but the data has no such field"):
        _ = Run.from_config(config).batch_shapes


@pytest.mark.parametrize("field", ["example", "examples"])
def test_without_data_both_fields_are_needed(field: str) -> None:
    config = declaring()
    del config.data[field]
    with pytest.raises(UserError, match=f"config.data.{field} is not set; without the data itself"):
        Run.from_config(config, data=False)
