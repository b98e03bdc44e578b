"""Documents packed into rows: first-fit by its definition, each once and whole, the same rows however they are made."""

from __future__ import annotations

import dataclasses
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grain import transforms as grain_transforms

from vlpjax.data import packed_documents
from vlpjax.data.bad import BadExample
from vlpjax.data.packed_documents import PackedDocuments, first_fit
from vlpjax.data.pipeline import Pipeline
from vlpjax.data.sources import Mixture
from vlpjax.errors import UserError

COUNT, LENGTH, IMAGES, LONGEST = 60, 19, 3, 20


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Records that are numbers; of some the source itself complains."""

    count: int = COUNT
    unreadable: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self.unreadable:
            raise UserError(f"number {index} cannot be read")
        return {"number": index}

    def describe(self, index: int) -> str:
        return f"numbers[{index}]"

    def fingerprint(self) -> str:
        return f"numbers {self.count}"


@dataclasses.dataclass(frozen=True)
class Write(grain_transforms.Map):
    """Document n: up to LONGEST tokens, each 100 n and its place, every tenth without pictures."""

    broken: tuple[int, ...] = ()
    large: tuple[int, ...] = ()

    def map(self, element: dict[str, Any]) -> dict[str, Any]:
        number = element["number"]
        if number in self.broken:
            raise BadExample("torn")
        size = LENGTH + 2 if number in self.large else 1 + 7 * number % LONGEST
        tokens = 100 * (number + 1) + np.arange(size, dtype=np.int32)
        shown = [] if number % 10 == 0 else [f"{number}/{k}" for k in range(number % IMAGES)]
        return {"tokens": tokens, "weights": tokens / np.float32(2), "image": shown}


@dataclasses.dataclass(frozen=True)
class Lengthen(grain_transforms.RandomMap):
    """A document of a length that is drawn."""

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        tokens = np.full(1 + int(rng.random() * LONGEST), element["number"] + 1, np.int32)
        return {"tokens": tokens, "weights": np.ones(len(tokens), np.float32)}


def packed(source: Any = None, write: Any = None, **fields: Any) -> PackedDocuments:
    given = dict(length=LENGTH, images=IMAGES, open_rows=4)
    return PackedDocuments(source or Numbers(), {"write": write or Write()}, **{**given, **fields})


def pipeline(**fields: Any) -> Pipeline:
    """Without pictures' names, which are no numbers."""
    return Pipeline(**{**dict(source=packed(), transforms={}, batch_size=4), **fields})


def held(batches: list[dict[str, np.ndarray]]) -> list[int]:
    """Which documents these batches hold, each as often as it is there."""
    found = []
    for batch in batches:
        for row in range(len(batch["tokens"])):
            tokens, segments = batch["tokens"][row], batch["segment_ids"][row]
            if batch.get("valid", np.ones(len(batch["tokens"]), bool))[row]:
                found += [int(tokens[segments == s][0]) // 100 - 1 for s in range(1, segments.max() + 1)]
    return sorted(found)


def order_of(source: PackedDocuments) -> list[int]:
    """All documents, row by row."""
    return [document for row in range(len(source)) for document in source.documents(row)]


def forget() -> None:
    """As in a process that has just begun."""
    packed_documents._PLANS.clear()


# --- which documents share a row ----------------------------------------------------------------------------------


def first_fit_by_definition(sizes: Any, room: Any, open_rows: int) -> list[list[int]]:
    rows: list[dict[str, Any]] = []
    for document, size in enumerate(sizes):
        fitting = [
            row
            for row in rows
            if row["open"]
            and all(used + more <= most for used, more, most in zip(row["used"], size, room, strict=True))
        ]
        if not fitting:
            waiting = [row for row in rows if row["open"]]
            if len(waiting) == open_rows:
                fullest = max(row["used"][0] for row in waiting)
                next(row for row in waiting if row["used"][0] == fullest)["open"] = False
            fitting = [dict(open=True, used=[0] * len(room), documents=[])]
            rows += fitting
        fitting[0]["documents"].append(document)
        fitting[0]["used"] = [used + more for used, more in zip(fitting[0]["used"], size, strict=True)]
    return [row["documents"] for row in rows]


@pytest.mark.parametrize("open_rows", [1, 2, 5, 200])
def test_a_document_goes_into_the_first_open_row_that_has_room(open_rows: int) -> None:
    rng = np.random.default_rng(open_rows)
    for most in (3, 10, 20):
        sizes = np.stack([rng.integers(1, most + 1, 80), rng.integers(0, 3, 80)], axis=1)
        rows = first_fit(sizes, (20, 4), open_rows)
        assert rows == first_fit_by_definition(sizes.tolist(), (20, 4), open_rows)
        assert sorted(document for row in rows for document in row) == list(range(80))
        assert all((sizes[row].sum(axis=0) <= (20, 4)).all() for row in rows)
    assert first_fit(np.zeros((0, 2), int), (20, 4), open_rows) == []


@pytest.mark.parametrize("length", [2048, 8192])
def test_rows_are_filled_to_98_percent_where_documents_are_as_long_as_they_often_are(length: int) -> None:
    lengths = np.random.default_rng(0).lognormal(np.log(300), 0.8, 10_000).astype(int)
    lengths = np.clip(lengths, 1, length)[:, None]
    assert lengths.sum() >= 0.98 * length * len(first_fit(lengths, (length,), PackedDocuments.open_rows))


# --- rows ---------------------------------------------------------------------------------------------------------


def test_a_row_is_its_documents_whole_and_one_behind_the_other() -> None:
    source = packed()
    for index in range(len(source)):
        row, documents = source[index], [Write().map({"number": n}) for n in source.documents(index)]
        used = sum(len(document["tokens"]) for document in documents)
        for name in ("tokens", "weights"):
            assert row[name].shape == (LENGTH + 1,) and row[name].dtype == documents[0][name].dtype
            np.testing.assert_array_equal(
                row[name][:used], np.concatenate([document[name] for document in documents])
            )
            assert not row[name][used:].any()
        want = [number for number, document in enumerate(documents, 1) for _ in document["tokens"]]
        assert row["segment_ids"].tolist() == want + [0] * (LENGTH + 1 - used)
        assert row["image"] == [image for document in documents for image in document["image"]]
    assert source.describe(0) == f"row 0 of {', '.join(f'numbers[{n}]' for n in source.documents(0))}"
    with pytest.raises(IndexError):
        source[len(source)]


def test_documents_without_pictures_need_no_room_for_them_and_padding_is_chosen() -> None:
    row = packed(write=Lengthen(), images=0, padding=7)[0]
    assert set(row) == {"tokens", "weights", "segment_ids"}
    assert np.all((row["segment_ids"] == 0) == (row["tokens"] == 7) * (row["weights"] == 0))


def test_the_order_in_which_documents_are_packed_is_drawn() -> None:
    orders = [order_of(packed()), order_of(packed(seed=1))]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == list(range(COUNT))


def test_what_is_drawn_for_a_document_is_drawn_once() -> None:
    """Its length is part of the plan."""
    forget()
    first = packed(write=Lengthen(), images=0)
    rows = [first[index] for index in range(len(first))]
    numbers = np.concatenate([row["tokens"][row["segment_ids"] > 0] for row in rows])
    assert set(numbers.tolist()) == set(range(1, COUNT + 1))
    forget()
    again = packed(write=Lengthen(), images=0)
    for index in reversed(range(len(rows))):
        np.testing.assert_array_equal(again[index]["tokens"], rows[index]["tokens"])


# --- streams ------------------------------------------------------------------------------------------------------


def test_one_pass_by_two_processes_has_every_document_once() -> None:
    """One of them makes its rows in processes of its own."""
    batches = []
    for rows, workers in (([0, 1], 2), ([2, 3], 0)):
        with pipeline(repeat=False, workers=workers).batches(rows=rows) as stream:
            batches += list(stream)
    assert held(batches) == list(range(COUNT))


def test_every_epoch_has_every_document_once_and_rows_in_a_new_order() -> None:
    stream = pipeline(batch_size=1)
    rows = stream.num_examples
    epochs = [[stream.batch(step) for step in range(first, first + rows)] for first in (0, rows)]
    assert held(epochs[0]) == held(epochs[1]) == list(range(COUNT))
    orders = [[int(batch["index"][0]) for batch in epoch] for epoch in epochs]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_starts_in_the_middle_goes_on_bit_for_bit(workers: int) -> None:
    with pipeline().batches(stop=9) as stream:
        whole = list(stream)
    record = pipeline().data_state(5)
    assert record["step"] == 5 and record["cursors"] == {"source": 20}  # nothing about packing
    forget()
    pipeline().check_state(record)
    with pipeline(workers=workers).batches(start_step=5, stop=9) as stream:
        rest = list(stream)
    for batch, want in zip(rest, whole[5:], strict=True):
        assert set(batch) == {"tokens", "weights", "segment_ids", "index"}
        for name in want:
            np.testing.assert_array_equal(batch[name], want[name])
    for other in (packed(open_rows=5), packed(seed=1), packed(write=Write(large=(9,)))):
        with pytest.raises(UserError, match="made with other data: source was"):
            pipeline(source=other).check_state(record)


def test_worker_processes_are_given_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    source = packed()
    with pipeline(source=source).batches(stop=1):
        sent = pickle.dumps(source)
    forget()
    monkeypatch.setattr(PackedDocuments, "_measured", lambda self: pytest.fail("measured again"))
    received = pickle.loads(sent)
    assert received.documents(3) == source.documents(3)
    assert received.fingerprint() == source.fingerprint()


# --- what fits no row, and sizes that are kept --------------------------------------------------------------------


def test_what_is_broken_or_larger_than_a_row_is_left_out_and_told(caplog: pytest.LogCaptureFixture) -> None:
    forget()
    write = Write(broken=(5,), large=(7, 8))
    with caplog.at_level(logging.INFO, "vlpjax.data"):
        source = packed(Numbers(unreadable=(3,)), write)
        rows = [source[index] for index in range(len(source))]
    kept = sorted(set(range(COUNT)) - {3, 5, 7, 8})
    assert sorted(order_of(source)) == kept
    filled = np.mean([row["segment_ids"] > 0 for row in rows])
    assert "numbers[3] is left out (number 3 cannot be read)" in caplog.text
    assert "numbers[5] is left out (torn)" in caplog.text
    assert (
        f"Packed {len(kept)} documents into {len(rows)} rows of {LENGTH + 1} tokens: {100 * filled:.2f} % are no "
        "padding, 4 documents were left out" in caplog.text
    )


def test_too_many_that_are_left_out_end_the_run() -> None:
    write = Write(broken=(0, 1), large=tuple(range(2, 11)))
    with pytest.raises(
        UserError, match="11 of 60 documents are left out, 9 of them as larger than a row of 20"
    ):
        len(packed(write=write))
    assert len(packed(write=write, max_bad_fraction=0.2))
    with pytest.raises(UserError, match="2 of 2 documents are left out, 0 of them as larger"):
        len(packed(Numbers(2), write))


def test_sizes_are_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sizes" / "numbers.npy"
    forget()
    first = packed(sizes=str(path))
    rows = list(map(first.documents, range(len(first))))
    assert [file.name for file in path.parent.iterdir()] == ["numbers.npy"]
    forget()
    assert list(map(packed().documents, range(len(first)))) == rows
    monkeypatch.setattr(PackedDocuments, "_measured", lambda self: pytest.fail("measured again"))
    forget()
    kept = packed(sizes=str(path))
    assert list(map(kept.documents, range(len(kept)))) == rows
    assert len(packed(sizes=str(path), length=2 * LENGTH)) < len(
        rows
    )  # rows of another length need no others
    with pytest.raises(UserError, match="holds those of other documents"):
        len(packed(Numbers(COUNT - 1), sizes=str(path)))
    path.write_bytes(b"torn")
    with pytest.raises(UserError, match="holds no sizes"):
        len(packed(sizes=str(path), length=2 * LENGTH + 1))


def test_settings_that_cannot_be_are_told() -> None:
    with pytest.raises(UserError, match="PackedDocuments.open_rows is 0; it is 1 or more"):
        packed(open_rows=0)
    with pytest.raises(UserError, match="PackedDocuments.images is -1"):
        packed(images=-1)
    with pytest.raises(UserError, match="has 'write', a str; it must be a grain Map"):
        packed(write="Write")
    with pytest.raises(UserError, match="was given a Mixture, which decides its own order"):
        packed(Mixture({"a": Numbers()}, {"a": 1.0}))
    with pytest.raises(UserError, match="a document has 1 'tokens' and 0 'image'; there is one per token"):
        len(packed(per_token=("image",)))
