"""The bundled emoji-1594: its content, and the programs that fetch, draw, caption, build and tokenize it."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import lzma
import pathlib
import tarfile
import zlib
from collections.abc import Mapping

import numpy as np
import PIL.Image
import pytest
import sentencepiece
import tensorflow_datasets as tfds

from data_pipelines import train_tokenizer
from data_pipelines.emoji1594 import __main__ as command
from data_pipelines.emoji1594 import captions, concepts, fetch, render
from vlpjax.data.tokenizer_making import train_sentencepiece
from vlpjax.errors import UserError

BUNDLED = pathlib.Path(__file__).parents[2] / "vlpjax" / "data" / "bundled"
COUNTS = {
    "noto": 1594,
    "noto_v1": 1182,
    "twemoji": 1594,
    "emojione": 1056,
    "fluent_flat": 1594,
    "fluent_gradient": 1594,
    "openmoji": 1594,
}
# Noto's "bust in silhouette" (Apache-2.0).
BUST = (
    '<path fill="#1976d2" d="M115.1 120v4H12.9v-4c0-15.7 19.9-23.3 42-24.9V94c-9.3-2.8-17.6-9.8-21.7-21.3'
    "c-4.2-1.5-6.6-15.3-5.5-17.1C26.9 49.8 21.4 4.3 64 4c42.5.2 37.1 45.6 36.2 51.5c1.1 1.8-1.3 15.6-5.5 17.1"
    'c-4 11.5-12.3 18.6-21.6 21.4v1c22.2 1.8 42 10.2 42 25"/>'
)


def icon_of(icons, aliases=None, name="a", **defaults):
    return render.find_icon({"prefix": "test", "icons": icons, "aliases": aliases or {}, **defaults}, name)


def pixels(webp: bytes) -> np.ndarray:
    return np.asarray(PIL.Image.open(io.BytesIO(webp)), dtype=np.int32)


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict]]:
    builder = tfds.builder_from_directory(BUNDLED / "emoji1594" / "1.0.0")
    sources = {vendor: builder.as_data_source(split=vendor) for vendor in builder.info.splits}
    return {vendor: [source[i] for i in range(len(source))] for vendor, source in sources.items()}


# The bundled records.


def test_every_vendor_has_its_split_and_its_count(splits):
    assert {vendor: len(records) for vendor, records in splits.items()} == COUNTS


def test_records_stand_in_the_order_of_labels_and_full_vendors_have_all(splits):
    for vendor, records in splits.items():
        labels = [record["label"] for record in records]
        assert labels == sorted(set(labels))
        assert vendor in ("noto_v1", "emojione") or labels == list(range(1594))


def test_a_label_means_the_same_concept_for_all_vendors(splits):
    shared = ("codepoints", "name", "keywords", "fold")
    for vendor, records in splits.items():
        for record in records:
            assert record["vendor"] == vendor.encode()
            assert [record[k] for k in shared] == [splits["noto"][record["label"]][k] for k in shared]


def test_labels_follow_the_numbers_of_the_code_points(splits):
    keys = [concepts.sort_key(record["codepoints"].decode()) for record in splits["noto"]]
    assert keys == sorted(set(keys))


def test_a_first_code_point_never_stands_in_two_folds(splits):
    folds: dict[bytes, set[int]] = {}
    for record in splits["noto"]:
        first = record["codepoints"].split(b"-")[0]
        folds.setdefault(first, set()).add(record["fold"])
        assert record["fold"] == zlib.crc32(first) % 5
    assert all(len(found) == 1 for found in folds.values())
    assert sum(record["fold"] == 0 for record in splits["noto"]) == 297


@pytest.mark.parametrize(
    ("codepoints", "name", "keyword"),
    [
        ("1f986", "duck", "bird"),
        ("1f54e", "menorah", "candlestick"),
        ("1f3a1", "ferris wheel", "amusement"),
        ("2764", "red heart", "heart"),
        ("1f469-200d-1f680", "woman astronaut", "rocket"),
    ],
)
def test_known_concepts_have_their_captions(splits, codepoints, name, keyword):
    record = next(r for r in splits["noto"] if r["codepoints"].decode() == codepoints)
    assert record["name"].decode() == name
    assert keyword in record["keywords"].decode().split("|")


def test_no_skin_tones_and_no_flags_of_countries(splits):
    codepoints = [record["codepoints"].decode() for record in splits["noto"]]
    assert all(concepts.is_concept(c) for c in codepoints)
    assert not concepts.is_concept("1f44b-1f3fd")
    assert not concepts.is_concept("1f1e9-1f1ea")
    assert not concepts.is_concept("1f3f4-e0067-e0062-e0065-e006e-e0067-e007f")
    assert concepts.is_concept("1f3f4-200d-2620")


def test_images_are_64_pixel_rgb_webp(splits):
    for records in splits.values():
        for record in records[::9]:
            image = PIL.Image.open(io.BytesIO(record["image"]))
            image.load()
            assert (image.format, image.size, image.mode) == ("WEBP", (64, 64), "RGB")


def test_drawings_of_other_things_are_left_out(splits):
    insect, up = "1f997", "1f199"
    held = {v: {r["codepoints"].decode() for r in records} for v, records in splits.items()}
    assert insect not in held["noto_v1"] and not {insect, up} & held["emojione"]
    assert insect in held["twemoji"] and up in held["noto_v1"]


def test_names_in_other_languages_are_in_the_order_of_labels(splits):
    table = json.loads(lzma.decompress((BUNDLED / "emoji1594" / "names.json.xz").read_bytes()))
    duck = table["codepoints"].index("1f986")
    assert table["codepoints"] == [record["codepoints"].decode() for record in splits["noto"]]
    assert table["names"]["en"] == [record["name"].decode() for record in splits["noto"]]
    assert (table["names"]["de"][duck], table["names"]["fr"][duck]) == ("Ente", "canard")
    assert len(table["names"]) == 105
    assert all(sum(n is not None for n in row) >= captions.MIN_NAMES for row in table["names"].values())


def test_metadata_hold_no_path_and_no_date():
    text = (BUNDLED / "emoji1594" / "1.0.0" / "dataset_info.json").read_text()
    keys = {
        "description",
        "disableShuffling",
        "fileFormat",
        "moduleName",
        "name",
        "releaseNotes",
        "splits",
        "version",
    }
    assert set(json.loads(text)) == keys
    assert "/tmp" not in text and str(BUNDLED) not in text


def test_the_notice_names_every_part():
    notice = (BUNDLED / "NOTICE").read_text(encoding="utf-8")
    for vendor, package in fetch.ICONS.items():
        assert f"\n{vendor}\n" in notice and f"{package.name} {package.version} " in notice
    assert "UNICODE LICENSE V3" in notice and "Microsoft Corporation" in notice


# Drawing.


def test_drawing_an_icon_again_gives_the_bundled_picture(splits):
    icon = icon_of({"a": {"body": BUST}}, width=128, height=128)
    drawn = render.render(icon)
    bundled = next(r["image"] for r in splits["noto"] if r["codepoints"] == b"1f464")
    assert drawn == render.render(icon)
    assert np.abs(pixels(drawn) - pixels(bundled)).mean() < 1
    # Another version of an encoder may choose other bytes for the same picture.
    assert drawn == bundled or render.encoders() != render.ENCODERS


def test_an_alias_can_mirror_and_turn_its_parent():
    icons = {"a": {"body": '<rect width="4" height="4" fill="red"/>'}}  # the upper left quarter
    aliases = {
        "mirrored": {"parent": "a", "hFlip": True},
        "twice": {"parent": "mirrored", "hFlip": True},
        "turned": {"parent": "a", "rotate": 2},
    }
    quarters = {"a": (0, 0), "mirrored": (0, 1), "twice": (0, 0), "turned": (1, 1)}
    for name, quarter in quarters.items():
        image = np.asarray(
            render.rasterize(render.to_svg(icon_of(icons, aliases, name, width=8, height=8)), 8)
        )
        red = image[2::4, 2::4, 1] == 0
        assert [tuple(where) for where in np.argwhere(red)] == [quarter]


def test_a_wide_icon_keeps_its_shape_and_stands_in_the_middle():
    icon = icon_of({"a": {"body": '<rect width="8" height="4"/>', "width": 8, "height": 4}})
    rows = np.asarray(render.rasterize(render.to_svg(icon), 8))[:, 4, 0]
    assert rows.tolist() == [255, 255, 0, 0, 0, 0, 255, 255]


def test_an_unknown_icon_is_none_and_a_circle_of_aliases_is_refused():
    assert icon_of({}, name="b") is None
    with pytest.raises(UserError, match="leads back to itself"):
        icon_of({}, {"a": {"parent": "b"}, "b": {"parent": "a"}})


# Captions.


def test_joining_strips_the_variation_selector_on_both_sides():
    table = {"\u2764\ufe0f": {"tts": ["red heart"], "default": ["heart"]}, "x": {"default": ["no name"]}}
    merged = captions.merge_annotations(table)
    assert merged == {"\u2764": captions.Caption("red heart", ("heart",))}
    assert captions.to_text("2764-fe0f") == captions.to_text("2764") == "\u2764"


def test_the_later_table_wins():
    merged = captions.merge_annotations({"x": {"tts": ["old"]}}, {"x": {"tts": ["new"]}})
    assert merged["x"].name == "new"


# Fetching.


def write_tarball(path: pathlib.Path, files: dict[str, bytes], link: str | None = None) -> str:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        if link:
            member = tarfile.TarInfo(link)
            member.type, member.linkname = tarfile.SYMTYPE, "/etc"
            archive.addfile(member)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_tarball_in_the_cache_is_checked_and_unpacked(tmp_path):
    sha256 = write_tarball(tmp_path / "scope-icons-1.0.0.tgz", {"package/icons.json": b"{}"})
    folder = fetch.fetch(fetch.Package("@scope/icons", "1.0.0", sha256), tmp_path)
    assert (folder / "icons.json").read_bytes() == b"{}"


def test_a_tarball_with_another_checksum_is_refused(tmp_path):
    write_tarball(tmp_path / "icons-1.0.0.tgz", {"package/icons.json": b"{}"})
    with pytest.raises(UserError, match=r"icons-1\.0\.0\.tgz has SHA-256 .*, not 000"):
        fetch.fetch(fetch.Package("icons", "1.0.0", "0" * 64), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["icons-1.0.0.tgz"]


@pytest.mark.parametrize("name", ["../evil", "package/../../evil", "/evil", "package\\..\\evil"])
def test_a_path_that_escapes_is_refused_before_anything_is_written(tmp_path, name):
    sha256 = write_tarball(tmp_path / "icons-1.0.0.tgz", {"package/good": b"", name: b""})
    with pytest.raises(UserError, match="escapes the folder"):
        fetch.fetch(fetch.Package("icons", "1.0.0", sha256), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["icons-1.0.0.tgz"]


def test_a_link_is_refused(tmp_path):
    sha256 = write_tarball(tmp_path / "icons-1.0.0.tgz", {"package/good": b""}, link="package/link")
    with pytest.raises(UserError, match="neither a regular file nor a folder"):
        fetch.fetch(fetch.Package("icons", "1.0.0", sha256), tmp_path)


# The whole build, from small packages.


@pytest.fixture
def small_cache(tmp_path, monkeypatch) -> pathlib.Path:
    """Packages with three concepts, one of which EmojiOne lacks, pinned in place of the real ones."""
    cache = tmp_path / "cache"
    cache.mkdir()
    slugs = {"1f986": "duck", "2764": "red-heart", "1f98a": "fox"}

    def pin(package: fetch.Package, files: Mapping[str, object]) -> fetch.Package:
        content = {f"package/{name}": json.dumps(value).encode() for name, value in files.items()}
        small = fetch.Package(package.name, "0", sha256="")
        return dataclasses.replace(small, sha256=write_tarball(cache / f"{small.stem}.tgz", content))

    def icon_files(vendor: str) -> dict[str, object]:
        drawn = [slug for slug in slugs.values() if (vendor, slug) != ("emojione", "fox")]
        circles = {slug: {"body": f'<circle cx="8" cy="8" r="{3 + i}"/>'} for i, slug in enumerate(drawn)}
        return {"icons.json": {"icons": circles}, "chars.json": slugs if vendor in concepts.NAMING else {}}

    words = {
        captions.to_text(c): {"tts": [s.replace("-", " ")], "default": ["a", "b"]} for c, s in slugs.items()
    }
    table = {"annotations/en/annotations.json": {"annotations": {"annotations": words}}}
    monkeypatch.setattr(fetch, "ICONS", {v: pin(p, icon_files(v)) for v, p in fetch.ICONS.items()})
    monkeypatch.setattr(fetch, "ANNOTATIONS", pin(fetch.ANNOTATIONS, table))
    monkeypatch.setattr(fetch, "DERIVED_ANNOTATIONS", pin(fetch.DERIVED_ANNOTATIONS, {"package.json": {}}))
    monkeypatch.setattr(captions, "MIN_NAMES", 3)
    return cache


def test_a_build_reads_back_and_its_check_notices_one_changed_byte(small_cache, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [f"--out={out}", f"--cache={small_cache}"]
    assert command.main(arguments) == 0
    builder = tfds.builder_from_directory(out / "emoji1594" / "1.0.0")
    record = builder.as_data_source(split="openmoji")[1]
    assert (record["name"], record["keywords"], record["label"]) == (b"duck", b"a|b", 1)
    assert [r["name"] for r in builder.as_data_source(split="emojione")] == [b"red heart", b"duck"]

    assert command.main([*arguments, "--check"]) == 0
    changed = next((out / "emoji1594" / "1.0.0").glob("*-noto.array_record*"))
    content = bytearray(changed.read_bytes())
    content[200] ^= 1
    changed.write_bytes(content)
    assert command.main([*arguments, "--check"]) == 1
    assert f"differs from its rebuild in: 1.0.0/{changed.name}" in capsys.readouterr().out


# The tokenizer.


def test_the_tokenizer_round_trips_every_caption(splits):
    model = (BUNDLED / "emoji1594.spm.model").read_bytes()
    names = [record["name"].decode() for record in splits["noto"]]
    keywords = [word for record in splits["noto"] for word in record["keywords"].decode().split("|")]
    train_tokenizer.check_round_trip(
        model, train_tokenizer.sentences(names, keywords, train_tokenizer.TEMPLATES)
    )
    with pytest.raises(UserError, match="does not survive"):
        train_tokenizer.check_round_trip(model, ["\u9d28"])  # a duck in Japanese takes single bytes


def test_the_tokenizer_has_the_agreed_ids_and_folds_case():
    processor = sentencepiece.SentencePieceProcessor(model_file=str(BUNDLED / "emoji1594.spm.model"))
    assert (processor.pad_id(), processor.eos_id(), processor.unk_id(), processor.bos_id()) == (0, 1, 2, -1)
    assert processor.vocab_size() == 3000
    assert processor.encode("Red\n HEART\ufe0f") == processor.encode("red heart")
    assert processor.decode(processor.encode("\u9d28")) == "\u9d28"


def test_training_gives_the_bundled_tokenizer():
    texts = train_tokenizer.sentences(
        *train_tokenizer.read_captions(BUNDLED / "emoji1594" / "1.0.0"), train_tokenizer.TEMPLATES
    )
    model = train_sentencepiece(texts, train_tokenizer.VOCAB_SIZE)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    bundled = sentencepiece.SentencePieceProcessor(model_file=str(BUNDLED / "emoji1594.spm.model"))
    assert [pieces.id_to_piece(i) for i in range(3000)] == [bundled.id_to_piece(i) for i in range(3000)]


def test_a_template_without_a_place_for_the_name_is_refused():
    with pytest.raises(UserError, match="must hold {} exactly once"):
        train_tokenizer.sentences(["duck"], [], ["a drawing"])
