"""Input speed: images per second and core of vlpjax's pipeline, beside a PyTorch DataLoader on the same work.

    python tools/bench_input.py                      # bundled 64 px images, ours alone and per-transform costs
    python tools/bench_input.py --torch              # pairs of measurements, ours and PyTorch's in turn
    python tools/bench_input.py --torch --images=generated --side=500 --format=JPEG --size=224

The work: read, decode, random resized crop, colour jitter, mirror (swapping left and right in the caption),
normalise to float32, tokenise, and assemble batches that arrive in the main process.  The PyTorch side is
written as it is customary: `Dataset.__getitem__` with the Pillow calls of torchvision's transforms, the default
collation, the same records from the same source, the same tokenizer, the same number of worker processes.

Both sides run in one program and take turns, each waiting until the other's processes have gone idle.  Wall
time says what a machine with nothing else to do would see; CPU time per image (all processes of that side) is
the steadier figure on a busy one.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image, ImageEnhance

from vlpjax.data import transforms as T
from vlpjax.data.cache import Prepared
from vlpjax.data.paths import resolve_path
from vlpjax.data.pipeline import Pipeline, generator, name_key
from vlpjax.data.sources import TFDS, draw
from vlpjax.data.tokenizers import SentencePieceTokenizer
from vlpjax.data.transforms.images import swap_directions

JITTER: dict[str, Any] = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
SCALE, RATIO, LENGTH = (0.4, 1.0), (3 / 4, 4 / 3), 24
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@dataclasses.dataclass(frozen=True)
class Generated:
    """Smooth random images of one size with captions, encoded once and kept in memory."""

    count: int
    side: int
    format: str

    def __post_init__(self) -> None:
        records = [self._record(i) for i in range(self.count)]
        object.__setattr__(self, "_records", records)

    def _record(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng(index)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8))
        stream = io.BytesIO()
        coarse.resize((self.side, self.side), Image.Resampling.BICUBIC).save(stream, self.format, quality=85)
        words = rng.choice(["left", "right", "duck", "red", "house", "flag", "moon", "face"], 4)
        return {"image": stream.getvalue(), "name": " ".join(words), "label": index}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._records[index]  # type: ignore[attr-defined]

    def describe(self, index: int) -> str:
        return f"generated[{index}]"

    def fingerprint(self) -> str:
        return f"generated-{self.count}-{self.side}-{self.format}"


# --- our side -----------------------------------------------------------------------------------------------------


def our_transforms(size: int, tokenizer: SentencePieceTokenizer, jitter: bool) -> dict[str, Any]:
    color = {"jitter": T.ColorJitter(**JITTER)} if jitter else {}
    return {
        "decode": T.Decode(),
        "crop": T.RandomResizedCrop(size, scale=SCALE, ratio=RATIO),
        **color,
        "flip": T.RandomFlip(captions=("name",)),
        "normalize": T.Normalize(mean=MEAN, std=STD),
        "tokenize": T.Tokenize(tokenizer=tokenizer, length=LENGTH, field="name", lower=True),
    }


def profile(pipeline: Pipeline, count: int) -> dict[str, float]:
    """Microseconds of CPU per example and stage, in one thread."""
    spent: dict[str, float] = {}

    def timed(stage: str, function: Callable[..., Any], *arguments: Any) -> Any:
        begin = time.thread_time()
        result = function(*arguments)
        spent[stage] = spent.get(stage, 0.0) + time.thread_time() - begin
        return result

    for step in range(-(-count // pipeline.batch_size)):  # opens files, loads the tokenizer, fills caches
        pipeline.batch(step)
    for position in range(count):
        index, _ = timed("order", draw, pipeline.source, position, pipeline.seed, True)
        example = timed("read", pipeline.source.__getitem__, index)
        for name, transform in pipeline.transforms.items():
            if hasattr(transform, "random_map"):
                rng = timed("generators", generator, pipeline.seed, name_key(name), position)
                example = timed(name, transform.random_map, example, rng)
            else:
                example = timed(name, transform.map, example)
    steps = max(1, count // pipeline.batch_size)
    begin = time.thread_time()
    for step in range(steps):
        pipeline.batch(step)
    whole = (time.thread_time() - begin) / (steps * pipeline.batch_size)
    costs = {stage: 1e6 * seconds / count for stage, seconds in spent.items()}
    return {
        **costs,
        "assembling and the rest": 1e6 * whole - sum(costs.values()),
        "whole example": 1e6 * whole,
    }


# --- PyTorch's side -----------------------------------------------------------------------------------------------


def torch_crop_box(width: int, height: int) -> tuple[int, int, int, int]:
    """The procedure of torchvision's RandomResizedCrop."""
    for _ in range(10):
        area = width * height * random.uniform(*SCALE)
        aspect = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return left, top, left + w, top + h
    return 0, 0, width, height


def shift_hue(image: Image.Image, amount: float) -> Image.Image:
    """Hue as torchvision turns it for Pillow images: through HSV."""
    hue, saturation, value = image.convert("HSV").split()
    turned = np.array(hue, dtype=np.uint8) + np.uint8(int(amount * 255) % 256)
    return Image.merge("HSV", (Image.fromarray(turned, "L"), saturation, value)).convert("RGB")


def jitter_customary(image: Image.Image) -> Image.Image:
    for op in random.sample(range(4), 4):
        if op == 3:
            image = shift_hue(image, random.uniform(-JITTER["hue"], JITTER["hue"]))
        else:
            enhancer = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[op]
            image = enhancer(image).enhance(random.uniform(0.6, 1.4))
    return image


class CustomaryDataset:
    """A map-style PyTorch data set over `source` (such a set needs only ``len`` and ``[i]``)."""

    def __init__(self, source: Any, size: int, tokenizer_file: str, jitter: bool):
        self.source, self.size, self.tokenizer_file, self.jitter = source, size, tokenizer_file, jitter
        self.model: Any = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch

        record = self.source[index]
        image = Image.open(io.BytesIO(record["image"])).convert("RGB")
        image = image.crop(torch_crop_box(*image.size)).resize(
            (self.size, self.size), Image.Resampling.BILINEAR
        )
        if self.jitter:
            image = jitter_customary(image)
        text = record["name"]
        if random.random() < 0.5:
            image, text = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), swap_directions(text)
        # ToTensor and Normalize: channels first, to [0, 1], then by mean and deviation.
        tensor = torch.from_numpy(np.array(image, copy=True)).permute(2, 0, 1).contiguous()
        tensor = tensor.to(torch.float32).div(255)
        mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
        return {
            "image": tensor.sub_(mean).div_(std),
            "text": self.tokens(text),
            "label": record["label"],
            "index": index,
        }

    def tokens(self, text: str) -> Any:
        import torch

        if self.model is None:
            import sentencepiece

            self.model = sentencepiece.SentencePieceProcessor(model_file=self.tokenizer_file)
        ids = [*self.model.encode(text.lower())[: LENGTH - 1], self.model.eos_id()]
        padded = torch.zeros(LENGTH, dtype=torch.int32)
        padded[: len(ids)] = torch.tensor(ids, dtype=torch.int32)
        return padded


def torch_loader(dataset: CustomaryDataset, batch_size: int, workers: int) -> Any:
    """A DataLoader in the customary settings; processes are spawned, as ours are, because ArrayRecord asks for it."""
    from torch.utils.data import DataLoader, Dataset

    return DataLoader(
        cast(Dataset, dataset), batch_size=batch_size, shuffle=True, num_workers=workers, drop_last=True,
        persistent_workers=workers > 0, multiprocessing_context="spawn" if workers else None,
    )  # fmt: skip


def endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


# --- measuring ----------------------------------------------------------------------------------------------------


def children() -> set[int]:
    """Process ids of all descendants of this program."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = _stat(int(entry.name))
            if fields:
                parents[int(entry.name)] = int(fields[1])
    found, grown = {os.getpid()}, True
    while grown:
        new = {pid for pid, parent in parents.items() if parent in found} - found
        found, grown = found | new, bool(new)
    return found - {os.getpid()}


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; empty if the process has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def cpu_seconds(pids: set[int]) -> float:
    ticks = sum(int(fields[11]) + int(fields[12]) for pid in pids if (fields := _stat(pid)))
    return ticks / os.sysconf("SC_CLK_TCK")


class Side:
    """One of the two contestants: an iterator of batches and the worker processes that belong to it."""

    def __init__(self, name: str, batches: Iterator[Any], batch_size: int):
        before = children()
        self.name, self.batches, self.batch_size = name, batches, batch_size
        for _ in range(4):
            next(self.batches)
        self.pids = children() - before | {os.getpid()}
        self.wait_until_idle()

    def wait_until_idle(self) -> float:
        """Returns when the look-ahead is full and nothing runs any more; the time when the last work was done."""
        last, active = cpu_seconds(self.pids), time.perf_counter()
        while time.perf_counter() - active < 0.5:
            time.sleep(0.03)
            now = cpu_seconds(self.pids)
            if now - last > 0.015:
                active = time.perf_counter()
            last = now
        return active

    def turn(self, batches: int) -> tuple[float, float]:
        """Images per second of wall time, and per second of CPU time.

        The turn lasts from full look-ahead to full look-ahead, so exactly as many batches are made as are taken,
        and what was made beforehand flatters nobody.
        """
        cpu, begin = cpu_seconds(self.pids), time.perf_counter()
        for _ in range(batches):
            next(self.batches)
        wall = self.wait_until_idle() - begin
        cpu = cpu_seconds(self.pids) - cpu
        return batches * self.batch_size / wall, batches * self.batch_size / cpu


def compare(ours: Side, theirs: Side, pairs: int, batches: int, workers: int) -> None:
    wall, cpu, rates = [], [], []
    for pair in range(pairs):
        order = (ours, theirs) if pair % 2 == 0 else (theirs, ours)
        result = {side.name: side.turn(batches) for side in order}
        a, b = result[ours.name], result[theirs.name]
        wall.append(a[0] / b[0])
        cpu.append(a[1] / b[1])
        rates.append((a, b))
        print(
            f"pair {pair}: images/s {a[0]:7.0f} and {b[0]:7.0f}; per CPU second {a[1]:6.0f} and {b[1]:6.0f}",
            flush=True,
        )
    per_core = max(1, workers)
    for number, side in enumerate((ours, theirs)):
        speed = statistics.median(rate[number][0] for rate in rates)
        per_cpu = statistics.median(rate[number][1] for rate in rates)
        print(
            f"{side.name:8} {speed:7.0f} images/s, {speed / per_core:7.0f} per worker, {per_cpu:7.0f} per CPU second"
        )
    print(
        f"median ratio of {pairs} pairs, {workers} workers each: {statistics.median(wall):.2f} in wall time "
        f"(from {min(wall):.2f} to {max(wall):.2f}), {statistics.median(cpu):.2f} in CPU time "
        f"(from {min(cpu):.2f} to {max(cpu):.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", choices=("bundled", "generated"), default="bundled")
    parser.add_argument("--count", type=int, default=2000, help="number of generated images")
    parser.add_argument("--side", type=int, default=256, help="side of generated images")
    parser.add_argument(
        "--format", choices=("JPEG", "PNG", "WEBP"), default="JPEG", help="format of generated images"
    )
    parser.add_argument("--size", type=int, default=64, help="side of the images in the batch")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--batches", type=int, default=24, help="batches per turn")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--no_jitter", action="store_true", help="leave out the colour jitter on both sides")
    parser.add_argument(
        "--cached", action="store_true", help="our side keeps decoded images in memory (Prepared)"
    )
    parser.add_argument("--torch", action="store_true", help="compare with a PyTorch DataLoader")
    options = parser.parse_args()

    tokenizer = SentencePieceTokenizer("bundled:emoji1594.spm.model")
    bundled = "noto+noto_v1+twemoji+emojione+fluent_flat+fluent_gradient"
    source = (
        TFDS("bundled:emoji1594/1.0.0", bundled)
        if options.images == "bundled"
        else Generated(options.count, options.side, options.format)
    )
    jitter, ahead = not options.no_jitter, 2 * max(1, options.workers)
    pipeline = Pipeline(
        source=Prepared(source, {"decode": T.Decode()}) if options.cached else source,
        transforms=our_transforms(options.size, tokenizer, jitter),
        batch_size=options.batch_size,
        workers=options.workers,
        threads=1,
        prefetch=ahead,
    )
    if not options.torch:
        for stage, cost in profile(pipeline, 8 * options.batch_size).items():
            print(f"{stage:24} {cost:8.1f} microseconds")
        return
    dataset = CustomaryDataset(source, options.size, resolve_path(tokenizer.path), jitter)
    loader = torch_loader(dataset, options.batch_size, options.workers)
    with pipeline.batches() as stream:
        ours = Side("vlpjax", stream, options.batch_size)
        theirs = Side("PyTorch", endless(loader), options.batch_size)
        compare(ours, theirs, options.pairs, options.batches, options.workers)


if __name__ == "__main__":
    main()
