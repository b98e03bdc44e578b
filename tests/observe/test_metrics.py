"""Metric files survive kills, resumes, odd values and full disks."""

from __future__ import annotations

import errno
import json
import math
import os

import numpy as np
import pytest

from vlpjax.errors import UserError
from vlpjax.observe.metrics import MetricWriter, read_jsonl


def write_steps(writer, steps):
    for step in steps:
        writer.write(step, {"train/loss": 1.0 / (step + 3), "train/accuracy": np.float32(step / 7)})
        writer.timing(step, {"seconds": 0.5 * step})


def tensorboard_scalars(directory):
    """All (tag, step, value) and all restart steps, in the order of the files."""
    from tensorboardX.proto.event_pb2 import Event

    scalars, restarts = [], []
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            scalars += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            restarts += [event.step] if event.HasField("session_log") else []
    return scalars, restarts


def test_a_killed_and_resumed_run_ends_with_the_same_bytes(tmp_path):
    with MetricWriter(tmp_path / "whole", None) as writer:
        write_steps(writer, range(1, 21))

    with MetricWriter(tmp_path / "resumed", None) as writer:
        write_steps(writer, range(1, 14))  # The checkpoint is of step 10; the kill came during step 14.
    with open(tmp_path / "resumed" / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 14, "train/lo')
    with MetricWriter(tmp_path / "resumed", 10) as writer:
        write_steps(writer, range(11, 21))

    for name in ("metrics.jsonl", "timing.jsonl"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list((tmp_path / "resumed").glob("*.partial"))


def test_tensorboard_gets_every_scalar_and_hides_what_the_resume_repeats(tmp_path):
    with MetricWriter(tmp_path, None) as writer:
        write_steps(writer, [1, 2])
    with MetricWriter(tmp_path, 1) as writer:
        write_steps(writer, [2])

    scalars, restarts = tensorboard_scalars(tmp_path / "tensorboard")
    assert restarts == [2]  # TensorBoard forgets what came before the restart from step 2 on.
    assert [step for tag, step, _ in scalars if tag == "train/loss"] == [1, 2, 2]
    assert ("timing/seconds", 2, 1.0) in scalars


def test_a_fresh_run_forgets_an_old_one(tmp_path):
    for step in (5, 1):
        with MetricWriter(tmp_path, None) as writer:
            writer.write(step, {"loss": 1.0})

    assert [record["step"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == [1]
    assert tensorboard_scalars(tmp_path / "tensorboard")[0] == [("loss", 1, 1.0)]


def test_values_round_trip_and_lines_stay_json(tmp_path):
    values = {"b": 0.1 + 0.2, "a": math.nan, "d": -math.inf, "c": np.float32(0.1), "e": 3}
    with MetricWriter(tmp_path, None) as writer:
        writer.write(7, values)

    line = (tmp_path / "metrics.jsonl").read_text()
    strict = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert list(strict) == ["step", "a", "b", "c", "d", "e"]
    (record,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert math.isnan(record.pop("a"))
    assert record == {"step": 7, "b": 0.1 + 0.2, "c": float(np.float32(0.1)), "d": -math.inf, "e": 3}


def test_a_torn_last_line_is_left_out_but_damage_elsewhere_is_told(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]

    path.write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match="metrics.jsonl line 2 is not JSON"):
        read_jsonl(path)


def test_a_whole_last_line_without_its_line_end_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}')
    MetricWriter(tmp_path, 1).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n'


def test_a_full_disk_is_one_sentence_and_leaves_whole_lines(tmp_path, monkeypatch):
    writer = MetricWriter(tmp_path, None)
    writer.write(1, {"loss": 1.0})
    real_write, calls = os.write, []

    def half_then_full(descriptor, data):
        calls.append(data)
        if len(calls) == 1:
            return real_write(descriptor, data[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half_then_full)
        with pytest.raises(
            UserError, match=r"No space left on the disk while writing .*metrics\.jsonl"
        ) as caught:
            writer.write(2, {"loss": 2.0})
    assert "\n" not in str(caught.value)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'
    writer.close()


def test_other_errors_of_the_system_are_not_called_a_full_disk(tmp_path, monkeypatch):
    writer = MetricWriter(tmp_path, None)

    def broken(descriptor, data):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", broken)
        with pytest.raises(OSError, match="Input/output error"):
            writer.write(1, {"loss": 1.0})
    writer.close()


def test_only_the_enabled_process_touches_the_disk(tmp_path):
    with MetricWriter(tmp_path / "run", None, enabled=False) as writer:
        write_steps(writer, [1])
        writer.sync()
    assert not (tmp_path / "run").exists()
