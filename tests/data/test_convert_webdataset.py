"""The converter keeps every good record, counts the bad ones, and always writes the same shards."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from data_pipelines import convert_webdataset
from vlpjax.data.sources import ArrayRecords, WebDataset
from vlpjax.errors import UserError


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (2, 2), (number, 0, 0)).save(stream, "png")
    return stream.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def samples(numbers) -> dict[str, bytes]:
    members = {}
    for n in numbers:
        members |= {
            f"{n:03d}.png": png(n),
            f"{n:03d}.txt": b"duck %d" % n,
            f"{n:03d}.json": b'{"label": %d}' % n,
        }
    return members


def run(output: Path, *arguments: str) -> dict:
    code = convert_webdataset.main([f"--output={output}", "--name=set", "--runner=DirectRunner", *arguments])
    assert code == 0
    return json.loads((output / "set.summary.json").read_text())


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> Path:
    """Two whole tars, one of them compressed, and one with five bad samples, which then breaks off."""
    folder = tmp_path_factory.mktemp("tars")
    write_tar(folder / "a-0.tar", samples(range(6)))
    write_tar(folder / "a-1.tar", samples(range(6, 9)))
    (folder / "a-1.tar.gz").write_bytes(gzip.compress((folder / "a-1.tar").read_bytes()))
    (folder / "a-1.tar").unlink()
    bad = {
        "0.txt": b"no image",
        "1.png": png(1),
        "2.png": b"not a picture",
        "2.txt": b"x",
        "3.png": png(3),
        "3.txt": b"\xff",
        "4.png": png(4),
        "4.txt": b"x",
        "4.json": b"[1]",
    }
    write_tar(folder / "bad.tar", bad | samples([9, 10]))
    content = (folder / "bad.tar").read_bytes()
    (folder / "bad.tar").write_bytes(
        content[: content.index(b"010.txt") + 100]
    )  # breaks off in the last sample
    return folder


@pytest.fixture(scope="module")
def converted(tars, tmp_path_factory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("converted")
    return output, run(output, f"--tars={tars}/a-{{0.tar,1.tar.gz}} {tars}/b*.tar", "--shards=3")


def test_good_records_are_readable_and_complete(converted, tars):
    output, _ = converted
    records = ArrayRecords(f"{output}/set.array_record-*-of-00003")
    found = {example["key"]: example for example in map(records.__getitem__, range(len(records)))}
    assert {e["label"] for e in found.values()} >= set(range(10))
    original = WebDataset(f"{tars}/a-0.tar")
    for i in range(6):
        assert found[f"a-0/{i:03d}"] == original[i] | {"key": f"a-0/{i:03d}"}


def test_bad_records_are_counted_by_reason(converted):
    _, summary = converted
    assert summary["bad_by_reason"] == {
        "damaged tar: ReadError": 1,
        "no image": 1,
        "no text": 1,
        "unreadable image": 1,
        "unreadable text or JSON": 2,
    }
    assert (summary["good"], summary["bad"], summary["shards"], summary["inputs"]) == (10, 6, 3, 3)


def test_nothing_unfinished_is_left_and_every_shard_exists(converted):
    output, _ = converted
    names = sorted(path.name for path in output.iterdir())
    assert names == [f"set.array_record-{i:05d}-of-00003" for i in range(3)] + ["set.summary.json"]


def test_shards_hold_their_keys_in_order(converted):
    output, _ = converted
    for shard in range(3):
        records = ArrayRecords(f"{output}/set.array_record-{shard:05d}-of-00003")
        keys = [records[i]["key"] for i in range(len(records))]
        assert keys == sorted(keys)
        assert {convert_webdataset.shard_of(key, 3) for key in keys} == {shard}


def test_the_same_input_gives_the_same_bytes_and_replaces_old_shards(converted, tars):
    """As a command of its own, with the inputs in another order, as another cluster might take them."""
    output, _ = converted
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    inputs = f"--tars={tars}/b*.tar {tars}/a-{{1.tar.gz,0.tar}}"
    command = [sys.executable, "-m", "data_pipelines.convert_webdataset", inputs, "--name=set", "--shards=3"]
    root = Path(convert_webdataset.__file__).parents[1]
    subprocess.run([*command, f"--output={output}"], cwd=root, capture_output=True, check=True)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_a_folder_is_converted_and_shards_may_be_empty(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "captions.csv").write_text("file,caption\na.png,a duck\nb.png,not a picture\n")
    (folder / "a.png").write_bytes(png(1))
    (folder / "b.png").write_bytes(b"text")
    summary = run(tmp_path / "out", f"--folder={folder}", "--shards=4")
    assert (summary["good"], summary["bad_by_reason"]) == (1, {"unreadable image": 1})
    assert len(list((tmp_path / "out").glob("set.array_record-*-of-00004"))) == 4
    records = ArrayRecords(f"{tmp_path}/out/set.array_record-*")
    assert [records[i] for i in range(len(records))] == [
        {"image": png(1), "text": "a duck", "key": "000000000"}
    ]


def test_a_shard_that_fails_leaves_no_file_under_its_name(tmp_path):
    def records():
        yield b"one"
        raise RuntimeError("the worker died")

    with pytest.raises(RuntimeError, match="the worker died"):
        convert_webdataset.write_shard(f"{tmp_path}/shard", records())
    assert list(tmp_path.iterdir()) == []


def test_wrong_calls_are_explained_in_one_sentence(tmp_path, capsys):
    out = ["--name=x", f"--output={tmp_path}/out"]
    assert convert_webdataset.main([f"--tars={tmp_path}/none-*.tar", *out]) == 1
    assert "No tar" in (said := capsys.readouterr().err) and said.count("\n") == 1
    for folder in ("p", "q"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "a.tar", samples([1]))
    assert convert_webdataset.main([f"--tars={tmp_path}/*/a.tar", *out]) == 1
    assert "Several tars are named 'a'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        convert_webdataset.main(["--tars=x", "--shards=0", *out])
    assert "--shards is 0; it must be at least 1" in capsys.readouterr().err


def test_without_beam_the_program_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"pip install 'vlpjax\[beam\]'"):
        convert_webdataset.convert(
            convert_webdataset.parse_arguments(["--tars=x", "--output=o", "--name=n"])[0], []
        )
