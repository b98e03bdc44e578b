"""Feeding meshes: the same global batch on every mesh, from the rows that each device holds."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from grain import transforms as grain_transforms
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlpjax.data.bad import BadExample
from vlpjax.data.feed import BatchLayout, feed
from vlpjax.data.pipeline import Pipeline
from vlpjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Records of a few numbers; record 5 is bad."""

    count: int = 40

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 5:
            raise BadExample("five is right out")
        return {"values": np.full((2, 3), index, np.float32), "label": index}

    def describe(self, index: int) -> str:
        return f"numbers[{index}]"

    def fingerprint(self) -> str:
        return f"numbers {self.count}"


@dataclasses.dataclass(frozen=True)
class Wide(Numbers):
    """Records whose values differ along their last axis."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"values": np.arange(8, dtype=np.float32).reshape(2, 4) + index, "label": index}


@dataclasses.dataclass(frozen=True)
class Noise(grain_transforms.RandomMap):
    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        return {**element, "noise": rng.random()}


def pipeline(**changes: Any) -> Pipeline:
    return Pipeline(**({"source": Numbers(), "transforms": {"noise": Noise()}, "batch_size": 16} | changes))


def mesh(data: int, model: int = 1) -> Mesh:
    devices = np.array(jax.devices()[: data * model]).reshape(data, model)
    return Mesh(devices, ("data", "model"))


@pytest.mark.parametrize(("data", "model"), [(1, 1), (2, 1), (8, 1), (2, 4), (4, 2)])
def test_the_global_batch_does_not_depend_on_the_mesh(data, model):
    sharding = NamedSharding(mesh(data, model), PartitionSpec("data"))
    with feed(pipeline(), sharding, start_step=3, stop=6) as stream:
        steps = []
        for step, batch, _ in stream:
            steps.append(step)
            expected = pipeline().batch(step)
            assert batch.keys() == expected.keys()
            for name, array in batch.items():
                np.testing.assert_array_equal(np.asarray(array), expected[name])
                assert array.sharding.is_equivalent_to(sharding, array.ndim)
                assert array.addressable_shards[0].data.shape[0] == 16 // data
    assert steps == [3, 4, 5]


def test_the_batch_can_lie_over_several_axes():
    sharding = NamedSharding(mesh(2, 4), PartitionSpec(("data", "model")))
    with feed(pipeline(), sharding) as stream:
        _, batch, _ = next(stream)
    assert batch["values"].addressable_shards[0].data.shape == (2, 2, 3)
    np.testing.assert_array_equal(np.asarray(batch["label"]), pipeline().batch(0)["label"])


def test_fields_can_lie_over_axes_of_their_own():
    over = mesh(2, 4)
    rows, spread = (NamedSharding(over, PartitionSpec("data", *axes)) for axes in ((), (None, "model")))
    wide = pipeline(source=Wide())
    with feed(wide, {"values": spread, "label": rows}) as stream:
        _, batch, _ = next(stream)
    assert batch["values"].sharding.is_equivalent_to(spread, 3)
    assert batch["values"].addressable_shards[0].data.shape == (8, 2, 1)
    assert batch["noise"].sharding.is_equivalent_to(rows, 1)
    for name, array in batch.items():
        np.testing.assert_array_equal(np.asarray(array), wide.batch(0)[name])


def test_a_process_makes_only_the_rows_of_its_devices(monkeypatch):
    everywhere = NamedSharding.addressable_devices_indices_map
    monkeypatch.setattr(  # what the second of two processes sees
        NamedSharding,
        "addressable_devices_indices_map",
        lambda self, shape: dict(list(everywhere(self, shape).items())[4:]),
    )
    layout = BatchLayout(16, NamedSharding(mesh(8), PartitionSpec("data")))
    assert layout.rows == list(range(8, 16))
    assert list(layout.places.values()) == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]


def test_replacements_and_waiting_are_reported():
    with feed(pipeline(), NamedSharding(mesh(1), PartitionSpec("data")), stop=5) as stream:
        reports = [report for _, _, report in stream]
    # Five steps of 16 are two epochs of 40, and each holds the bad record once.
    assert sum(report.replaced for report in reports) == 2
    assert {str(bad) for report in reports for bad in report.bad} == {
        "numbers[5] cannot be used (five is right out); example 6 stands in for it"
    }
    assert all(report.wait_seconds >= 0 for report in reports)


def test_a_finite_stream_ends_and_marks_its_padding():
    evaluation = pipeline(source=Numbers(5), transforms={}, repeat=False, shuffle=False, batch_size=4)
    with feed(evaluation, NamedSharding(mesh(4), PartitionSpec("data"))) as stream:
        batches = [batch for _, batch, _ in stream]
    assert [np.asarray(batch["valid"]).tolist() for batch in batches] == [
        [True] * 4,
        [True, False, False, False],
    ]


def test_errors_of_the_stream_reach_the_caller():
    bad = pipeline(keep=("values", "names"))
    with (
        feed(bad, NamedSharding(mesh(1), PartitionSpec())) as stream,
        pytest.raises(UserError, match="names 'names'"),
    ):
        next(stream)


def test_a_batch_that_the_mesh_cannot_divide_is_told():
    with pytest.raises(
        UserError, match="batch_size is 12, which the 8 shards of the mesh axes data cannot divide"
    ):
        feed(pipeline(batch_size=12), NamedSharding(mesh(8), PartitionSpec("data")))
