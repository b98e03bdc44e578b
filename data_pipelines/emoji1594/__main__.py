"""Builds emoji-1594 from pinned packages: python -m data_pipelines.emoji1594 --out=DIR --cache=DIR [--check]

Fetches the packages into --cache, draws 10,000 icons (two minutes on one core) and writes
<out>/emoji1594/1.0.0/ and <out>/emoji1594/names.json.xz.  With --check nothing is written: the rebuilt files
are compared with those in --out byte for byte, and the exit code is 1 if any differs.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import sys
import tempfile

from data_pipelines.emoji1594 import captions, concepts, fetch, render
from vlpjax.errors import UserError

NAME = "emoji1594"


def build(out: pathlib.Path, cache: pathlib.Path) -> pathlib.Path:
    """Builds the data set below ``out``; returns its folder ``out/emoji1594``, which must not exist yet."""
    from data_pipelines.emoji1594 import emoji1594_dataset_builder as builder_module  # imports TFDS: slow

    packages = {vendor: fetch.fetch(package, cache) for vendor, package in fetch.ICONS.items()}
    annotations = fetch.fetch(fetch.ANNOTATIONS, cache)
    derived = fetch.fetch(fetch.DERIVED_ANNOTATIONS, cache)
    english = captions.read_captions(annotations, derived, "en")
    builder = builder_module.Emoji1594(packages=packages, english=english, data_dir=out)
    builder_module.tfds.disable_progress_bar()
    builder.download_and_prepare()
    builder_module.make_reproducible(pathlib.Path(builder.data_path))
    names = concepts.IconSets(packages).concepts()
    table = captions.pack_names(names, captions.read_names(annotations, derived, names))
    (out / NAME / "names.json.xz").write_bytes(table)
    return out / NAME


def differences(left: pathlib.Path, right: pathlib.Path) -> list[str]:
    """Names the files below two folders that are missing on one side or have other bytes."""
    names = {
        path.relative_to(root).as_posix()
        for root in (left, right)
        for path in root.rglob("*")
        if path.is_file()
    }

    def same(name: str) -> bool:
        a, b = left / name, right / name
        return a.is_file() and b.is_file() and a.read_bytes() == b.read_bytes()

    return sorted(name for name in names if not same(name))


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_pipelines.emoji1594", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder that holds emoji1594/")
    parser.add_argument("--cache", type=pathlib.Path, required=True, help="folder for the fetched packages")
    parser.add_argument(
        "--check", action="store_true", help="compare a rebuild with --out instead of writing"
    )
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        built = build(pathlib.Path(scratch), options.cache)
        target = options.out / NAME
        if options.check:
            return report(differences(built, target), target)
        if target.exists():
            shutil.rmtree(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(built, target)
    print(f"wrote {target}")
    return 0


def report(different: list[str], target: pathlib.Path) -> int:
    """Prints the outcome of --check; returns the exit code."""
    if not different:
        print(f"{target} equals its rebuild, byte for byte")
        return 0
    print(f"{target} differs from its rebuild in: {', '.join(different)}")
    if render.encoders() != render.ENCODERS:
        print(f"the bundled files were written with {render.ENCODERS}, this machine has {render.encoders()}")
    return 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
