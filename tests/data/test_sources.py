"""Every source gives back what was written, in any order, process and thread, and says what is wrong."""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
import os
import pickle
import shutil
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python import array_record_module
from PIL import Image

from vlpjax.data.paths import expand_braces, expand_files, resolve_path
from vlpjax.data.sources import (
    TFDS,
    ArrayRecords,
    Concat,
    Filter,
    ImageFolder,
    Parquet,
    WebDataset,
    pack_record,
)
from vlpjax.data.sources.array_records import WRITER_OPTIONS
from vlpjax.errors import UserError

BUILDER = """
import numpy as np
import tensorflow_datasets as tfds

class Builder(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Text(), "text": tfds.features.Text(), "label": np.int64,
                    "score": np.float32, "flag": np.bool_, "tags": tfds.features.Sequence(tfds.features.Text())}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, download_manager):
        return {"first": self._generate_examples(range(4)), "second": self._generate_examples(range(4, 7))}

    def _generate_examples(self, numbers):
        for n in numbers:
            yield n, {"image": b"\\xff" + bytes([n]), "text": f"duck {n} \\u00e9", "label": n, "score": n / 2,
                      "flag": n % 2 == 0, "tags": ["bird", str(n)]}
"""


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (2, 2), (number, 0, 0)).save(stream, "png")
    return stream.getvalue()


EXAMPLES = [{"image": png(n), "text": f"duck {n} é", "label": n} for n in range(7)]


def write_tar(path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def sample(number: int, key: str | None = None) -> dict[str, bytes]:
    example, key = EXAMPLES[number], key or f"{number:04d}"
    return {
        f"{key}.png": example["image"],
        f"{key}.txt": example["text"].encode(),
        f"{key}.json": json.dumps({"label": example["label"]}).encode(),
    }


def write_table(folder, rows: list[dict], name: str = "captions.csv") -> None:
    with open(folder / name, "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if name.endswith(".tsv") else ",")
        writer.writeheader()
        writer.writerows(rows)


def write_images(folder, names) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(number))


@pytest.fixture(scope="module")
def tfds_directory(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("tfds")
    package = root / "vlpjax_tiny"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "vlpjax_tiny_dataset_builder.py").write_text(BUILDER)
    sys.path.insert(0, str(root))
    try:
        module = importlib.import_module("vlpjax_tiny.vlpjax_tiny_dataset_builder")
        builder = module.Builder(data_dir=root / "data", file_format="array_record")
        builder.download_and_prepare()
    finally:
        sys.path.remove(str(root))
    return str(builder.data_dir)


@pytest.fixture(scope="module")
def sources(tmp_path_factory, tfds_directory) -> dict:
    """The same seven examples in every format, each spread over two files where the format has files."""
    root = tmp_path_factory.mktemp("sources")
    write_tar(root / "a-000.tar", sample(0) | sample(1) | sample(2))
    write_tar(root / "a-001.tar", sample(3) | sample(4) | sample(5) | sample(6))
    folder = root / "folder"
    write_images(folder, [f"{n}.png" for n in range(7)])
    rows = [{"file": f"{n}.png", "caption": e["text"], "label": e["label"]} for n, e in enumerate(EXAMPLES)]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, part in (("0", EXAMPLES[:3]), ("1", EXAMPLES[3:])):
        images = [{"bytes": e["image"], "path": None} for e in part]
        columns = {"image": images, "caption": [e["text"] for e in part], "label": [e["label"] for e in part]}
        pq.write_table(pa.table(columns), root / f"t-{name}.parquet", row_group_size=2)
        writer = array_record_module.ArrayRecordWriter(str(root / f"r-{name}.array_record"), WRITER_OPTIONS)
        for example in part:
            writer.write(pack_record(example))
        writer.close()
    records = ArrayRecords(f"{root}/r-*.array_record")
    return {
        "tfds": TFDS(tfds_directory, "first+second"),
        "webdataset": WebDataset(f"{root}/a-{{000..001}}.tar"),
        "image folder": ImageFolder(str(folder), captions="captions.jsonl"),
        "parquet": Parquet((f"{root}/t-0.parquet", f"{root}/t-1.parquet"), columns=("label",)),
        "array records": records,
        "concat": Concat(
            {"low": Filter(records, "label", (0, 1, 2)), "high": Filter(records, "label", (0, 1, 2), True)}
        ),
    }


KINDS = ["tfds", "webdataset", "image folder", "parquet", "array records", "concat"]


@pytest.fixture(params=KINDS)
def source(request, sources):
    return sources[request.param]


def by_label(source) -> dict:
    """Index of each label; TFDS shuffles when it writes."""
    return {source[i]["label"]: i for i in range(len(source))}


def test_everything_written_is_read_back(source):
    found = {source[i]["label"]: source[i] for i in range(len(source))}
    assert sorted(found) == list(range(7))
    for label, example in found.items():
        assert example["text"] == f"duck {label} é"
        expected = b"\xff" + bytes([label]) if isinstance(source, TFDS) else EXAMPLES[label]["image"]
        assert example["image"] == expected


def test_random_access_gives_the_same_in_any_order(source):
    forward = [source[i] for i in range(7)]
    assert [source[i] for i in (6, 0, 5, 1, 4, 2, 3)] == [forward[i] for i in (6, 0, 5, 1, 4, 2, 3)]


@pytest.mark.parametrize("index", [-1, 7])
def test_records_outside_the_source_do_not_exist(source, index):
    with pytest.raises(IndexError, match=f"Record {index} of"):
        source[index]


def test_a_pickled_source_is_small_and_reads_the_same(source):
    before = [source[i] for i in range(7)]
    pickled = pickle.dumps(source)
    assert len(pickled) < 2000
    copy = pickle.loads(pickled)
    assert copy == source
    assert [copy[i] for i in range(7)] == before


def test_two_threads_read_what_one_reads(source):
    fresh = pickle.loads(pickle.dumps(source))  # so that the threads race for the opening too
    indices = [i % 7 for i in range(200)]
    with ThreadPoolExecutor(2) as pool:
        threaded = list(pool.map(fresh.__getitem__, indices))
    assert threaded == [source[i] for i in indices]


def in_forked_child(read) -> str:
    """What ``read`` gives or says in a forked child of this process."""
    receiver, sender = os.pipe()
    if os.fork() == 0:
        try:
            os.write(sender, str(read()).encode())
        except UserError as error:
            os.write(sender, str(error).encode())
        finally:
            os._exit(0)
    os.close(sender)
    with open(receiver, "rb") as stream:
        answer = stream.read().decode()
    os.wait()
    return answer


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning", "ignore:.*fork.*:RuntimeWarning")
def test_a_forked_process_opens_the_files_itself_or_says_that_it_cannot(source):
    expected = str(source[3])
    answer = in_forked_child(lambda: source[3])
    assert answer == expected or (
        "start processes with the 'spawn' method" in answer and "ArrayRecord" in answer
    )
    assert answer == expected or isinstance(source, (TFDS, ArrayRecords, Concat))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            "tfds",
            (
                "vlpjax_tiny 1.0.0 first+second[5]",
                "record 1 of",
                "vlpjax_tiny-second.array_record-00000-of-00001",
            ),
        ),
        ("webdataset", ("sample '0005'", "a-001.tar")),
        ("image folder", ("folder/5.png",)),
        ("parquet", ("row 0 of row group 1", "t-1.parquet")),
        ("array records", ("record 2 of", "r-1.array_record")),
        ("concat", ("high:", "record 2 of", "r-1.array_record")),
    ],
)
def test_records_are_described_by_where_they_lie(sources, kind, words):
    for word in words:
        assert word in sources[kind].describe(5)


def test_fingerprints_tell_sources_apart_and_do_not_depend_on_the_folder(sources, tmp_path):
    fingerprints = {kind: source.fingerprint() for kind, source in sources.items()}
    assert len(set(fingerprints.values())) == len(sources)
    first, second = sources["webdataset"]._opened.paths
    for path in (first, second):
        shutil.copyfile(path, tmp_path / os.path.basename(path))
    assert WebDataset(f"{tmp_path}/a-*.tar").fingerprint() == fingerprints["webdataset"]
    assert WebDataset(f"{tmp_path}/a-000.tar").fingerprint() != fingerprints["webdataset"]


# TFDS


def test_tfds_fields_have_their_own_types(tfds_directory):
    source = TFDS(tfds_directory, "first")
    example = source[by_label(source)[3]]
    assert {k: v for k, v in example.items() if k != "image"} == {
        "text": "duck 3 é", "label": 3, "score": 1.5, "flag": False, "tags": ["bird", "3"],
    }  # fmt: skip
    assert type(example["flag"]) is bool and type(example["label"]) is int
    assert TFDS(tfds_directory, "first", bytes_fields=("image", "text"))[0]["text"].startswith(b"duck")


def test_tfds_splits_can_be_added_and_cut(tfds_directory):
    assert len(TFDS(tfds_directory, "first[:50%]+second")) == 5


def test_tfds_finds_prepared_data_by_name(tfds_directory):
    data_dir = os.path.dirname(os.path.dirname(tfds_directory))
    by_name = TFDS(name="vlpjax_tiny", data_dir=data_dir, split="second")
    assert by_name[0] == TFDS(tfds_directory, "second")[0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"directory": "/no/such"}, "'/no/such' does not exist"),
        ({"directory": "/"}, "has no dataset_info.json"),
        ({"directory": "DIRECTORY", "split": "third"}, "no split 'third'; its splits are first, second"),
        ({"directory": "DIRECTORY", "split": "first[:0]"}, "is empty"),
        ({"directory": "DIRECTORY", "bytes_fields": (), "split": "first"}, "is not text .* bytes_fields"),
        ({"directory": "bundled:../secret"}, "no bundled data named '../secret'"),
        ({"name": "no_such_set", "data_dir": "/no/such"}, "no data set 'no_such_set'"),
        ({}, "give exactly one"),
    ],
)
def test_wrong_tfds_sources_are_explained(tfds_directory, arguments, sentence):
    arguments = {k: tfds_directory if v == "DIRECTORY" else v for k, v in arguments.items()}
    with pytest.raises(UserError, match=sentence):
        TFDS(**arguments)[0]


# Image folders


@pytest.mark.parametrize("name", ["captions.csv", "captions.tsv", "captions.jsonl", "captions.json"])
def test_every_kind_of_captions_table_is_read(tmp_path, name):
    write_images(tmp_path, ["a.png", "sub/b.png"])
    rows = [
        {"file": "a.png", "caption": "a duck, swimming", "by": "me"},
        {"file": "sub/b.png", "caption": "b", "by": "you"},
    ]
    if name.endswith(("csv", "tsv")):
        write_table(tmp_path, rows, name)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name).write_text(lines if name.endswith("jsonl") else json.dumps(rows))
    source = ImageFolder(str(tmp_path), captions=name)
    assert [source[i] for i in range(len(source))] == [
        {"image": png(0), "text": "a duck, swimming", "by": "me"},
        {"image": png(1), "text": "b", "by": "you"},
    ]


def test_several_captions_of_an_image_become_a_list_everywhere(tmp_path):
    write_images(tmp_path, ["a.png", "b.png"])
    write_table(tmp_path, [{"f": "a.png", "c": "one"}, {"f": "b.png", "c": "x"}, {"f": "a.png", "c": "two"}])
    source = ImageFolder(str(tmp_path), file="f", caption="c")
    assert [source[i]["captions"] for i in range(2)] == [["one", "two"], ["x"]]
    assert "text" not in source[0]
    (tmp_path / "map.json").write_text(json.dumps({"a.png": ["one", "two"], "b.png": "x"}))
    assert ImageFolder(str(tmp_path), captions="map.json")[0]["captions"] == ["one", "two"]


def test_captions_lie_beside_the_images(tmp_path):
    write_images(tmp_path, ["a.png", "sub/b.png"])
    (tmp_path / "a.txt").write_text("a duck\n")
    (tmp_path / "sub" / "b.txt").write_text("a goose\n")
    source = ImageFolder(str(tmp_path), captions="sidecar")
    assert [source[i]["text"] for i in range(2)] == ["a duck", "a goose"]


def test_sub_folders_are_classes(tmp_path):
    write_images(tmp_path, ["goose/1.png", "duck/2.png", "duck/1.png"])
    source = ImageFolder(str(tmp_path), captions="folders")
    assert [(source[i]["label"], source[i]["class_name"]) for i in range(3)] == [
        (0, "duck"),
        (0, "duck"),
        (1, "goose"),
    ]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"file": "b.png", "caption": "x"}], "caption for 'b.png', but .* holds no such file"),
        ([{"file": "../out.png", "caption": "x"}], "'../out.png', which lies outside"),
        ([{"file": "/etc/hostname", "caption": "x"}], "'/etc/hostname', which lies outside"),
        ([{"name": "a.png", "caption": "x"}], "no column 'file' in caption, name"),
        ([{"file": "a.png", "title": "x"}], "no column 'caption' in file, title"),
    ],
)
def test_wrong_captions_tables_are_explained(tmp_path, rows, sentence):
    write_images(tmp_path, ["in/a.png", "out.png"])
    write_table(tmp_path / "in", rows)
    with pytest.raises(UserError, match=sentence):
        len(ImageFolder(str(tmp_path / "in")))


def test_links_that_leave_the_folder_are_refused(tmp_path):
    write_images(tmp_path, ["in/a/1.png", "out.png"])
    os.symlink(tmp_path / "out.png", tmp_path / "in" / "a" / "2.png")
    with pytest.raises(UserError, match="'a/2.png', which lies outside"):
        len(ImageFolder(str(tmp_path / "in"), captions="folders"))


def test_other_wrong_image_folders_are_explained(tmp_path):
    for captions, sentence in (
        ("captions.csv", "captions table .* does not exist; the folder has a.png"),
        ("sidecar", "'a.png' in .* has no caption file 'a.txt'"),
        ("folders", "holds no captioned images"),
        ("bad.json", "cannot be read"),
    ):
        write_images(tmp_path, ["a.png"])
        if captions == "bad.json":
            (tmp_path / captions).write_text("{")
        with pytest.raises(UserError, match=sentence):
            len(ImageFolder(str(tmp_path), captions=captions))
    (tmp_path / "b.txt").write_text("no image")
    with pytest.raises(UserError, match="caption 'b.txt', but no image"):
        len(ImageFolder(str(tmp_path), captions="sidecar"))
    with pytest.raises(UserError, match="captions='sidecars' is not understood"):
        ImageFolder(str(tmp_path), captions="sidecars")
    with pytest.raises(UserError, match="'/no/such' does not exist"):
        len(ImageFolder("/no/such"))


# Parquet


def test_parquet_images_may_be_bytes_or_files_and_captions_lists(tmp_path):
    write_images(tmp_path, ["a.png"])
    pq.write_table(pa.table({"raw": [png(5)], "sentences": [["one", "two"]]}), tmp_path / "bytes.parquet")
    example = Parquet(str(tmp_path / "bytes.parquet"), image="raw", text="sentences")[0]
    assert example == {"image": png(5), "captions": ["one", "two"]}
    pq.write_table(pa.table({"image": [{"bytes": None, "path": "a.png"}]}), tmp_path / "path.parquet")
    assert Parquet(str(tmp_path / "path.parquet"), text=None)[0] == {"image": png(0)}
    pq.write_table(pa.table({"image": [{"bytes": None, "path": "../a.png"}]}), tmp_path / "escape.parquet")
    with pytest.raises(UserError, match="lies outside"):
        Parquet(str(tmp_path / "escape.parquet"), text=None)[0]


def test_wrong_parquet_files_are_explained(tmp_path):
    path = str(tmp_path / "t.parquet")
    pq.write_table(pa.table({"image": [b"x", b"y"], "caption": ["x", None]}), path)
    with pytest.raises(UserError, match="no column 'text'; its columns are image, caption"):
        len(Parquet(path, text="text"))
    with pytest.raises(UserError, match="'caption' of row 1 of row group 0 of .* is null"):
        Parquet(path)[1]
    with pytest.raises(UserError, match="no column 'fold'; its columns are"):
        len(Filter(Parquet(path), "fold", (0,)))
    pq.write_table(pa.table({"image": pa.array([], pa.binary()), "caption": pa.array([], pa.string())}), path)
    with pytest.raises(UserError, match="hold no rows"):
        len(Parquet(path))
    (tmp_path / "t.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        len(Parquet(path))


# WebDataset


def test_the_index_is_made_once_and_made_again_when_the_tar_changes(tmp_path):
    tar, index = tmp_path / "a.tar", tmp_path / "a.tar.index.json"
    write_tar(tar, sample(0))
    assert WebDataset(str(tar))[0]["label"] == 0
    written = index.stat().st_mtime_ns
    assert WebDataset(str(tar))[0]["label"] == 0
    assert index.stat().st_mtime_ns == written
    write_tar(tar, sample(1) | sample(2))
    assert [WebDataset(str(tar))[i]["label"] for i in range(2)] == [1, 2]
    index.write_text("{ half an ind")
    assert len(WebDataset(str(tar))) == 2


def test_the_index_may_lie_elsewhere(tmp_path):
    write_tar(tmp_path / "a.tar", sample(0))
    assert len(WebDataset(str(tmp_path / "a.tar"), index_dir=str(tmp_path / "new" / "index"))) == 1
    assert os.listdir(tmp_path / "new" / "index") == ["a.tar.index.json"]
    assert not (tmp_path / "a.tar.index.json").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="give a writable index_dir"):
        len(WebDataset(str(tmp_path / "a.tar"), index_dir=str(tmp_path / "file")))


def test_keys_keep_their_folder_and_end_at_the_first_dot(tmp_path):
    name = "v1.2/" + "long" * 40 + "/x"  # long names take extra headers in the tar
    write_tar(
        tmp_path / "a.tar", {f"{name}.seg.PNG": b"mask", f"{name}.png": png(1), f"{name}.txt": b"a duck\n"}
    )
    assert WebDataset(str(tmp_path / "a.tar"))[0] == {"key": name, "image": png(1), "text": "a duck"}
    assert WebDataset(str(tmp_path / "a.tar"), image=("seg.png",), text=())[0] == {
        "key": name,
        "image": b"mask",
    }


def test_incomplete_samples_are_kept_and_raise_when_read(tmp_path):
    write_tar(tmp_path / "a.tar", sample(0) | {"x.txt": b"no image"} | {"y.png": png(0), "y.txt": b"\xff"})
    source = WebDataset(str(tmp_path / "a.tar"))
    assert len(source) == 3
    with pytest.raises(UserError, match=r"sample 'x' of .*a.tar.*no jpg/jpeg/png/webp member, only txt"):
        source[1]
    with pytest.raises(UserError, match="sample 'y'.*not UTF-8"):
        source[2]


def test_damaged_and_compressed_tars_are_explained(tmp_path):
    whole = tmp_path / "whole.tar"
    write_tar(whole, sample(0) | sample(1))
    content = whole.read_bytes()
    with gzip.open(tmp_path / "z.tar.gz", "wb") as stream:
        stream.write(content)
    (tmp_path / "cut.tar").write_bytes(content[:700])
    header = content.index(b"0001.png")
    (tmp_path / "broken.tar").write_bytes(content[:header] + b"\x07" * 512 + content[header + 512 :])
    write_tar(tmp_path / "empty.tar", {})
    for name, sentence in (
        ("z.tar.gz", "gzip-compressed, .* convert it with data_pipelines/convert_webdataset.py"),
        ("cut.tar", "is damaged: unexpected end of data"),
        ("broken.tar", "is damaged: bad member header"),
        ("empty.tar", "hold no samples"),
        ("none.tar", "No tar file .*none.tar' exists"),
    ):
        with pytest.raises(UserError, match=sentence):
            len(WebDataset(str(tmp_path / name)))


# ArrayRecord files


def test_wrong_array_records_are_explained(tmp_path):
    def write(name, records):
        writer = array_record_module.ArrayRecordWriter(str(tmp_path / name), WRITER_OPTIONS)
        for record in records:
            writer.write(record)
        writer.close()
        return ArrayRecords(str(tmp_path / name))

    with pytest.raises(UserError, match="hold no records"):
        len(write("empty", []))
    with pytest.raises(UserError, match="Cannot read record 1 of .*/other: "):
        write("other", [pack_record({"a": 1}), b"\xc1 not MessagePack"])[1]
    with pytest.raises(UserError, match="holds a list instead of a map"):
        write("list", [b"\x90"])[0]
    (tmp_path / "text").write_text("no ArrayRecord file " * 100)
    with pytest.raises(UserError, match="/text' is not a readable ArrayRecord file"):
        len(ArrayRecords(str(tmp_path / "text")))
    with pytest.raises(UserError, match=r"fields \{'a': 'object'\} cannot be stored"):
        pack_record({"a": object()})


def test_empty_files_among_others_are_passed_over(tmp_path):
    for name, records in (("0", []), ("1", [{"n": 1}]), ("2", []), ("3", [{"n": 3}])):
        writer = array_record_module.ArrayRecordWriter(str(tmp_path / name), WRITER_OPTIONS)
        for record in records:
            writer.write(pack_record(record))
        writer.close()
    source = ArrayRecords(f"{tmp_path}/{{0..3}}")
    assert [source[i]["n"] for i in range(len(source))] == [1, 3]
    assert source.describe(1) == f"record 0 of {tmp_path}/3"


# Filters


class Counting:
    """Counts how often it is read."""

    reads = 0

    def __init__(self, name):
        self.name = name

    def __len__(self):
        return 6

    def __getitem__(self, index):
        type(self).reads += 1
        return {"fold": index % 3}

    def describe(self, index):
        return f"{self.name}[{index}]"

    def fingerprint(self):
        return self.name


def test_a_filter_keeps_or_drops_values_and_scans_once():
    source = Counting("scanned once")
    kept = Filter(source, "fold", (0,))
    assert [kept.describe(i) for i in range(len(kept))] == ["scanned once[0]", "scanned once[3]"]
    assert Counting.reads == 6
    assert len(Filter(source, "fold", (0,))) == len(pickle.loads(pickle.dumps(kept))) == 2
    assert Counting.reads == 6
    dropped = Filter(source, "fold", (0,), exclude=True)
    assert [dropped[i]["fold"] for i in range(len(dropped))] == [1, 2, 1, 2]
    assert kept.fingerprint() != dropped.fingerprint()


def test_wrong_filters_are_explained():
    with pytest.raises(UserError, match=r"No record of 6 has a 'fold' that is one of \(9,\)"):
        len(Filter(Counting("x"), "fold", (9,)))
    with pytest.raises(UserError, match=r"x\[0\] has no field 'vendor' to filter by; it has \['fold'\]"):
        len(Filter(Counting("x"), "vendor", ("noto",)))


def test_parquet_is_filtered_by_a_column_that_examples_do_not_carry(sources):
    source = Parquet(sources["parquet"].files)
    assert [e["text"] for e in map(Filter(source, "label", (2, 5)).__getitem__, (0, 1))] == [
        "duck 2 é",
        "duck 5 é",
    ]


# Paths


def test_braces_and_globs_are_expanded_in_order(tmp_path):
    assert expand_braces("a-{08..11}-{x,y}") == [f"a-{n}-{c}" for n in ("08", "09", "10", "11") for c in "xy"]
    for name in ("b", "a", "c"):
        (tmp_path / name).touch()
    assert expand_files((f"{tmp_path}/{{c,a}}", f"{tmp_path}/[ab]"), "test") == tuple(
        f"{tmp_path}/{n}" for n in "caab"
    )
    with pytest.raises(UserError, match="list of test files is empty"):
        expand_files((), "test")


def test_paths_are_resolved(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert resolve_path("~/data") == "/home/someone/data"
    assert resolve_path("gs://bucket/~x") == "gs://bucket/~x"
    assert resolve_path("a/$HOME") == "a/$HOME"
    assert os.path.isdir(resolve_path("bundled:emoji1594/1.0.0"))
