"""The pipeline: batches are pure functions of the step, however they are computed; bad examples are replaced."""

from __future__ import annotations

import dataclasses
import io
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from grain import transforms as grain_transforms
from PIL import Image

from vlpjax.data import transforms as T
from vlpjax.data.cache import Prepared
from vlpjax.data.pipeline import Pipeline, generator, name_key
from vlpjax.data.sources import Concat, Mixture
from vlpjax.errors import UserError


def encoded(number: int) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@dataclasses.dataclass(frozen=True)
class Images:
    """`count` small images; the records in `broken` do not decode."""

    count: int = 50
    broken: tuple[int, ...] = ()
    first: int = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = b"\x89PNG broken" if index in self.broken else encoded(self.first + index)
        return {"image": image, "label": self.first + index, "name": f"thing {index}"}

    def describe(self, index: int) -> str:
        return f"images[{index}]"

    def fingerprint(self) -> str:
        return f"images {self.first} {self.count}"


@dataclasses.dataclass(frozen=True)
class Noise(grain_transforms.RandomMap):
    """Adds a field of random numbers."""

    field: str

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        return {**element, self.field: rng.random(3)}


def augmented(**changes: Any) -> Pipeline:
    transforms = {
        "decode": T.Decode(),
        "crop": T.RandomResizedCrop(8),
        "color": T.ColorJitter(0.4, 0.4, 0.4, 0.1),
        "flip": T.RandomFlip(),
        "normalize": T.Normalize(range="-1..1"),
        "noise": Noise("noise"),
    }
    return Pipeline(**({"source": Images(), "transforms": transforms, "batch_size": 8} | changes))


def plain(source: Any, **changes: Any) -> Pipeline:
    """Reads and decodes, nothing else."""
    return Pipeline(**({"source": source, "transforms": {"decode": T.Decode()}, "batch_size": 8} | changes))


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# --- purity -------------------------------------------------------------------------------------------------------


def test_a_batch_is_the_same_in_any_order_and_from_any_thread():
    steps = [0, 1, 5, 6, 7]
    alone = {step: augmented().batch(step) for step in steps}
    backwards = augmented()
    for step, batch in reversed(alone.items()):
        assert_same(backwards.batch(step), batch)
    shared = augmented()
    with ThreadPoolExecutor(4) as pool:
        for step, batch in zip(steps, pool.map(shared.batch, steps), strict=True):
            assert_same(batch, alone[step])
    assert not np.array_equal(alone[0]["noise"], alone[1]["noise"])


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_give_the_batches_of_their_steps(workers):
    pipeline = augmented(source=Images(broken=(3, 4)), batch_size=70, workers=workers, prefetch=2)
    with pipeline.batches(start_step=2, stop=5) as stream:
        streamed = list(stream)
    assert len(streamed) == 3
    for step, batch in enumerate(streamed, start=2):
        assert_same(batch, pipeline.batch(step))
    # Every epoch of 50 holds the two broken records; positions 140 to 349 hold four epochs and ends of two.
    assert stream.replaced == sum(len(pipeline.batch_and_report(step)[1]) for step in (2, 3, 4)) >= 8


def test_a_subset_of_rows_is_that_part_of_the_batch_and_reads_nothing_else():
    read = []

    class Watched(Images):
        def __getitem__(self, index: int) -> dict[str, Any]:
            read.append(index)
            return super().__getitem__(index)

    pipeline = augmented(source=Watched())
    whole = pipeline.batch(3)
    read.clear()
    part = pipeline.batch(3, rows=[5, 2])
    assert_same(part, {name: array[[5, 2]] for name, array in whole.items()})
    assert read == whole["index"][[5, 2]].tolist()


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_any_number_of_hosts_makes_the_same_global_batch(hosts):
    pipeline = augmented(source=Images(broken=(7,)))
    rows = np.split(np.arange(8), hosts)
    streams = [pipeline.batches(start_step=5, stop=7, rows=part) for part in rows]
    for step in (5, 6):
        parts = [next(stream) for stream in streams]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        assert_same(joined, pipeline.batch(step))
    for stream in streams:
        stream.close()


def test_every_epoch_has_each_example_once_in_a_new_order():
    pipeline = plain(Images(40))
    drawn = np.concatenate([pipeline.batch(step)["index"] for step in range(10)])
    first, second = drawn[:40], drawn[40:]
    assert sorted(first) == sorted(second) == list(range(40))
    assert first.tolist() != second.tolist()


def test_a_mixture_is_indexed_like_the_concatenation_of_its_parts():
    parts = {"a": Images(10), "b": Images(20, first=100)}
    batch = plain(Mixture(parts, weights={"a": 1.0, "b": 1.0}), batch_size=20).batch(1)
    assert batch["label"].tolist() == [i if i < 10 else 90 + i for i in batch["index"]]
    assert (batch["index"] < 10).sum() == 10


# --- randomness ---------------------------------------------------------------------------------------------------


def test_the_randomness_of_a_transform_does_not_depend_on_the_others():
    few = plain(Images(), transforms={"noise": Noise("x")}).batch(4)["x"]
    more = {"other": Noise("y"), "decode": T.Decode(), "flip": T.RandomFlip(), "noise": Noise("x")}
    batch = plain(Images(), transforms=more).batch(4)
    np.testing.assert_array_equal(batch["x"], few)
    assert not np.array_equal(batch["y"], few)


def test_generators_differ_by_seed_name_and_position_and_not_by_use():
    def draw(seed: int, name: str, position: int) -> tuple[float, ...]:
        return tuple(generator(seed, name_key(name), position).random(5))

    first = draw(0, "crop", 0)
    generator(0, name_key("crop"), 0).integers(10, size=3, dtype=np.int32)  # leaves half a word behind
    assert draw(0, "crop", 0) == first
    assert len({draw(s, n, p) for s in (0, 1, -1) for n in ("crop", "flip") for p in (0, 1, 10**12)}) == 18
    assert name_key("crop") == 3988929947  # CRC-32: the same in every process and version


# --- bad examples -------------------------------------------------------------------------------------------------


def test_a_corrupt_record_is_replaced_by_the_next_one_and_disturbs_no_other_row(caplog):
    good, pipeline = plain(Images(16)).batch(0), plain(Images(16, broken=(5, 6)))
    with caplog.at_level(logging.WARNING, "vlpjax.data"):
        batches = [pipeline.batch(step) for step in (0, 1, 0, 1)]
    for clean, batch in ((plain(Images(16)).batch(0), batches[0]), (plain(Images(16)).batch(1), batches[1])):
        for row, index in enumerate(clean["index"]):
            assert batch["index"][row] == (7 if index in (5, 6) else index)
    assert good["image"].shape == batches[0]["image"].shape
    messages = [record.getMessage() for record in caplog.records]
    reason = "image of 11 bytes cannot be decoded: it is in no known image format"
    assert sorted(messages) == [
        f"images[{bad}] cannot be used ({reason}); example 7 stands in for it" for bad in (5, 6)
    ]


def test_a_bad_example_of_a_mixture_is_replaced_from_its_own_part():
    parts = {"a": Images(4, broken=(3,)), "b": Images(4, first=100)}
    for source in (Mixture(parts), Concat(parts)):
        _, replaced = plain(source).batch_and_report(0)
        assert [(bad.drawn, bad.used) for bad in replaced] == [(3, 0)]


def test_too_many_bad_examples_end_the_stream_with_one_sentence():
    pipeline = plain(Images(20, broken=(1, 4, 9, 13)), min_bad_count=2, max_bad_fraction=0.1)
    with pytest.raises(
        UserError, match=r"of 16 examples could not be used.*images\[\d+\]: image of 11 bytes"
    ) as caught:
        list(pipeline.batches(stop=10))
    assert "\n" not in str(caught.value)


def test_a_source_without_a_good_example_is_an_error_and_no_endless_search():
    with pytest.raises(UserError, match="neither can the records after it"):
        plain(Images(3, broken=(0, 1, 2))).batch(0)
    with (
        plain(Images(3, broken=(0, 1, 2))).batches() as stream,
        pytest.raises(UserError, match="neither can"),
    ):
        next(stream)


def test_a_record_of_which_its_source_complains_is_replaced():
    class Damaged(Images):
        def __getitem__(self, index: int) -> dict[str, Any]:
            if index == 2:
                raise UserError("row 2 is null")
            return super().__getitem__(index)

    _, replaced = plain(Damaged(8)).batch_and_report(0)
    assert [(bad.drawn, bad.used, bad.reason) for bad in replaced] == [(2, 3, "row 2 is null")]


def test_a_programming_error_is_not_taken_for_bad_data():
    @dataclasses.dataclass(frozen=True)
    class Wrong(grain_transforms.Map):
        def map(self, element: dict[str, Any]) -> dict[str, Any]:
            return {**element, "size": element["image"].shaep}

    with pytest.raises(AttributeError) as caught:
        plain(Images(), transforms={"wrong": Wrong()}).batch(0)
    assert "images[" in caught.value.__notes__[0]


# --- evaluation ---------------------------------------------------------------------------------------------------


def test_one_pass_covers_the_source_and_pads_the_last_batch():
    pipeline = plain(Images(11), shuffle=False, repeat=False, batch_size=4)
    batches = list(pipeline.batches())
    assert pipeline.num_batches == len(batches) == 3
    assert np.concatenate([batch["index"] for batch in batches]).tolist() == [*range(11), 10]
    assert np.concatenate([batch["valid"] for batch in batches]).tolist() == [True] * 11 + [False]
    np.testing.assert_array_equal(batches[2]["image"][2], batches[2]["image"][3])
    assert "valid" not in plain(Images(11)).batch(0)
    with pytest.raises(UserError, match="there is no batch 3"):
        pipeline.batch(3)


def test_stand_ins_do_not_count_in_evaluation():
    batch = plain(Images(4, broken=(2,)), shuffle=False, repeat=False, batch_size=4).batch(0)
    assert batch["index"].tolist() == [0, 1, 3, 3]
    assert batch["valid"].tolist() == [True, True, False, True]


# --- what a batch holds -------------------------------------------------------------------------------------------


def test_batches_hold_numbers_in_device_types_and_only_the_fields_that_are_kept():
    batch = augmented().batch(0)
    types = {name: array.dtype.name for name, array in batch.items()}
    assert types == {"image": "float32", "label": "int32", "noise": "float32", "index": "int32"}
    assert plain(Images()).batch(0)["image"].dtype == np.uint8
    assert augmented(keep=("image",)).batch(0).keys() == {"image", "index"}
    with pytest.raises(UserError, match="keep names 'name', which is of type str"):
        augmented(keep=("name",)).batch(0)
    with pytest.raises(UserError, match="keep names 'txet', but examples have 'image'"):
        augmented(keep=("txet",)).batch(0)


def test_images_of_different_shapes_are_named_in_the_error():
    class Growing(Images):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"x": np.zeros(index + 1)}

    with pytest.raises(
        UserError, match=r"field 'x' has the shape \(2,\) in one example and \(1,\) in another"
    ):
        plain(Growing(), transforms={}, shuffle=False).batch(0)


def test_remembered_examples_give_the_same_batches():
    images = Images(20, broken=(2,))
    decode = {"decode": T.Decode(), "resize": T.Resize(24)}
    cached = augmented(source=Prepared(images, decode))
    plainly = augmented(source=images)
    plainly = dataclasses.replace(plainly, transforms={**decode, **plainly.transforms})
    for _ in range(2):
        assert_same(cached.batch(3), plainly.batch(3))


@dataclasses.dataclass(frozen=True)
class Counted(grain_transforms.Map):
    """Counts how often it is done."""

    calls: list[int] = dataclasses.field(default_factory=list)

    def map(self, element: dict[str, Any]) -> dict[str, Any]:
        self.calls.append(element["label"])
        return element


@pytest.mark.parametrize(("room", "times"), [(1 << 20, 1), (0, 3)])
def test_each_example_is_prepared_once_while_there_is_room(room, times):
    counted = Counted()
    source = Prepared(Images(4), {"decode": T.Decode(), "count": counted}, max_bytes=room)
    for _ in range(3):
        source[2]["label"] = 7  # what a reader does to its example is its own business
    assert source[2]["label"] == 2
    assert counted.calls[:times] == [2] * times
    assert len(counted.calls) == times + (room == 0)


def test_what_was_prepared_is_part_of_the_fingerprint():
    sources = (
        Images(),
        Prepared(Images(), {}),
        Prepared(Images(), {"r": T.Resize(8)}),
        Prepared(Images(), {"r": T.Resize(9)}),
    )
    assert len({source.fingerprint() for source in sources}) == 4


def test_only_what_draws_nothing_can_be_remembered():
    with pytest.raises(UserError, match="wrap its parts"):
        Prepared(Mixture({"a": Images()}), {})
    with pytest.raises(UserError, match=r"Prepared.transforms has 'noise'.*only a grain Map"):
        Prepared(Images(), {"noise": Noise("noise")})


# --- the data record ----------------------------------------------------------------------------------------------


def test_the_data_state_says_where_the_stream_is():
    parts = {"a": Images(10), "b": Images(30)}
    state = plain(Mixture(parts, weights={"a": 1.0, "b": 3.0})).data_state(10)
    assert (state["step"], state["position"], state["epoch"], state["seed"]) == (10, 80, 2, 0)
    assert state["cursors"] == {"a": 20, "b": 60}


def test_a_checkpoint_of_other_data_is_refused_by_name():
    state = augmented().data_state(3)
    augmented(workers=3, threads=1).check_state(state)  # how it is computed does not matter
    with pytest.raises(UserError, match="seed was 0 and is 1"):
        augmented(seed=1).check_state(state)
    with pytest.raises(UserError, match="source was images 0 50 and is images 0 49"):
        augmented(source=Images(49)).check_state(state)
    changed = augmented().transforms | {"crop": T.RandomResizedCrop(8, scale=(0.5, 1.0))}
    with pytest.raises(UserError, match=r"transform crop was .*0\.08.* and is .*0\.5"):
        augmented(transforms=changed).check_state(state)


def test_settings_are_checked_when_the_pipeline_is_built():
    with pytest.raises(UserError, match=r"Pipeline.batch_size is 0; it is 1 or more"):
        augmented(batch_size=0)
    with pytest.raises(UserError, match=r"transform 'decode' is a str"):
        augmented(transforms={"decode": "webp"})
    with pytest.raises(UserError, match="has no examples"):
        _ = augmented(source=Images(0)).num_examples
