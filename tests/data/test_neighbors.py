"""Streams of examples and their neighbours: the order of the examples, who follows, and tables that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny import rows_of
from vlpjax.data.pipeline import Pipeline
from vlpjax.data.sources import WithNeighbors, cursors, draw
from vlpjax.errors import UserError

SIZE = 12
RECORDS = rows_of(number=list(range(SIZE)))
TABLE = np.stack([(np.arange(SIZE) + step) % SIZE for step in (1, 2, 3, 4)], axis=1)


@pytest.fixture
def source(tmp_path: Path) -> WithNeighbors:
    np.save(tmp_path / "table.npy", TABLE)
    return WithNeighbors(RECORDS, str(tmp_path / "table.npy"))


def test_every_second_record_is_a_near_neighbour_of_the_one_before(source: WithNeighbors) -> None:
    drawn = [draw(source, position, 5, True) for position in range(6 * SIZE)]
    assert drawn[::2] == [draw(RECORDS, position, 5, True) for position in range(3 * SIZE)]
    steps = [(after - before) % SIZE for (before, _), (after, _) in zip(drawn[::2], drawn[1::2], strict=True)]
    assert set(steps) == {1, 2, 3}  # the fourth is one too many
    assert drawn != [draw(source, position, 6, True) for position in range(6 * SIZE)]
    assert cursors(source, 7) == {"records": 4}


def test_a_batch_holds_both_and_is_the_same_when_it_is_made_again(source: WithNeighbors) -> None:
    pipeline = Pipeline(source=source, transforms={}, batch_size=8)
    first, again = pipeline.batch(3), pipeline.batch(3)
    number = first["number"]
    np.testing.assert_array_equal(number, again["number"])
    np.testing.assert_array_equal(number, first["index"])
    assert set((number[1::2] - number[::2]) % SIZE) <= {1, 2, 3}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (TABLE[:, :2], r"has int64\[12, 2\]; for the 12 records"),
        (TABLE[:5], "for the 12 records"),
        (TABLE.astype(np.float32), "float32"),
        (TABLE + 5, "records that the source does not have"),
        ((TABLE - 1) % SIZE, "as its own neighbour"),
    ],
)
def test_tables_that_do_not_fit_are_refused(tmp_path: Path, table: Any, message: str) -> None:
    np.save(tmp_path / "table.npy", table)
    with pytest.raises(UserError, match=message):
        WithNeighbors(RECORDS, str(tmp_path / "table.npy")).locate(1, 0, True)


def test_a_table_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no file"):
        WithNeighbors(RECORDS, str(tmp_path / "table.npy")).locate(1, 0, True)
