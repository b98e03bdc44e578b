"""Writes a work directory like that of a finished run, with drawn pictures and plausible curves."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("disc", "square", "triangle", "ring", "star", "bar")
COLOURS = {"red": "#d6443c", "amber": "#e0a526", "green": "#3f9b57", "blue": "#3a78c3", "violet": "#8656b8"}
NAMES = [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS]


def picture(name: str, seed: int = 0) -> str:
    """A drawing of "<colour> <shape>" as a data URI."""
    colour, shape = name.split(" ", 1)
    rng = np.random.default_rng(seed + NAMES.index(name))
    image = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(image)
    margin = int(rng.integers(6, 14))
    low, high, fill = margin, 63 - margin, COLOURS[colour]
    if shape == "disc":
        draw.ellipse((low, low, high, high), fill=fill)
    elif shape == "square":
        draw.rectangle((low, low, high, high), fill=fill)
    elif shape == "triangle":
        draw.polygon([(32, low), (high, high), (low, high)], fill=fill)
    elif shape == "ring":
        draw.ellipse((low, low, high, high), outline=fill, width=9)
    elif shape == "star":
        turns = [(math.pi * k / 5 - math.pi / 2, (32 - low) / (1 + k % 2 * 1.4)) for k in range(10)]
        draw.polygon([(32 + r * math.cos(a), 32 + r * math.sin(a)) for a, r in turns], fill=fill)
    else:
        draw.rounded_rectangle((low, 24, high, 40), radius=6, fill=fill)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_fake_run(
    workdir: Path, *, steps: int = 800, captions: Mapping[str, str] | None = None, failed: bool = True
) -> Path:
    """Fills ``workdir`` with everything a run leaves; ``captions`` replaces texts shown for names."""
    workdir.mkdir(parents=True, exist_ok=True)
    _write_json(workdir / "config.json", _CONFIG)
    _write_json(workdir / "environment.json", _ENVIRONMENT)
    _write_curves(workdir, steps)
    evaluations = workdir / "evaluations"
    evaluations.mkdir(exist_ok=True)
    for name, title, skill, seed in (
        ("style", "Held-out style", 0.7, 1),
        ("concept", "Held-out concepts", 0.35, 2),
    ):
        _write_json(evaluations / f"{name}.json", _retrieval(title, steps, skill, seed, captions or {}))
    if failed:
        _write_json(
            evaluations / "zeroshot.json",
            {"step": steps, "title": "Zero-shot classification", "error": "no class names for label 7"},
        )
    return workdir


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2))


def _write_curves(workdir: Path, steps: int) -> None:
    rng = np.random.default_rng(0)
    metrics, timing = [], []
    for step in range(10, steps + 1, 10):
        done = step / steps
        loss = 5.5 * math.exp(-4 * done) + 0.7 + 0.18 * rng.standard_normal() * (1.2 - done)
        rate = 1e-3 * min(step / 80, 0.5 * (1 + math.cos(math.pi * done)))
        metrics.append(
            {
                "step": step,
                "train/clip/accuracy": min(
                    max(0.9 * (1 - math.exp(-3 * done)) + 0.03 * rng.standard_normal(), 0), 1
                ),
                "train/clip/logit_scale": 14.3 + 20 * done,
                "train/grad_norm": 1.2 + 2 * math.exp(-6 * done) + abs(0.3 * rng.standard_normal()),
                "train/learning_rate": rate,
                "train/loss": loss,
            }
        )
        timing.append(
            {
                "step": step,
                "seconds": 0.55 * step,
                "examples_per_second": 465 + 14 * rng.standard_normal(),
                "input_wait": abs(0.02 + 0.008 * rng.standard_normal()),
                "step_seconds": 0.55,
            }
        )
        if step % 100 == 0:
            metrics.append({"step": step} | _scores_at(done))
    for name, lines in (("metrics", metrics), ("timing", timing)):
        (workdir / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _scores_at(done: float) -> dict[str, float]:
    scores = {}
    for name, skill in (("style", 0.7), ("concept", 0.35)):
        for direction, factor in (("text_to_image", 1.0), ("image_to_text", 0.92)):
            for rank, share in ((1, 0.45), (5, 0.8), (10, 1.0)):
                value = skill * factor * share * (1 - math.exp(-3 * done))
                scores[f"eval/{name}/{direction}/recall@{rank}"] = value
    return scores


def _retrieval(title: str, step: int, skill: float, seed: int, captions: Mapping[str, str]) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    scores = _scores_at(1.0)
    name = "style" if "style" in title else "concept"
    metrics = {
        key.split("/", 2)[2]: value for key, value in scores.items() if key.startswith(f"eval/{name}/")
    }
    metrics["text_to_image/median_rank"] = 3.0
    chance = {key: int(key.split("@")[1]) / 1594 for key in metrics if "@" in key}
    chance["text_to_image/median_rank"] = 797.0
    examples = []
    for direction in ("text->image", "image->text"):
        for query in rng.choice(NAMES, 6, replace=False):
            examples.append(_example(direction, str(query), skill, rng, captions))
    return {"step": step, "title": title, "metrics": metrics, "chance": chance, "examples": examples}


def _example(
    direction: str, query: str, skill: float, rng: np.random.Generator, captions: Mapping[str, str]
) -> dict[str, Any]:
    def item(name: str, kind: str) -> dict[str, Any]:
        text = captions.get(name, f"{name}, drawn flat")
        return {"text": text} if kind == "text" else {"image": picture(name, int(rng.integers(9)))}

    asked, answered = direction.split("->")
    found = [name for name in rng.choice(NAMES, 5, replace=False) if name != query][:5]
    if rng.random() < skill:
        found = [query, *found]
    elif rng.random() < 0.5:
        found.insert(2, query)
    found = [str(name) for name in found[:5]]
    scores = np.sort(rng.uniform(0.1, 0.5, len(found)))[::-1]
    results = [
        item(name, answered) | {"score": round(float(score), 3), "correct": name == query}
        for name, score in zip(found, scores, strict=True)
    ]
    return {
        "direction": direction,
        "query": item(query, asked),
        "results": results,
        "correct": found[0] == query,
    }


_CONFIG = {
    "name": "clip, small",
    "seed": 0,
    "steps": "800 steps",
    "towers": {
        "image": {
            "type": "vlpjax.models.vit:ViT",
            "variant": "Ti/8",
            "pool": "map",
            "width": 192,
            "patch_size": [8, 8],
            "norm": {"type": "vlpjax.models.layers:LayerNorm", "epsilon": 1e-6},
        },
        "text": {"type": "vlpjax.models.text:TextTransformer", "width": 192, "depth": 6, "causal": False},
    },
    "objectives": {"clip": {"weight": 1.0, "loss": {"type": "vlpjax.objectives.contrastive:InfoNCE"}}},
    "optimizer": {"type": "vlpjax.optim.factory:adamw", "learning_rate": 1e-3, "weight_decay": 0.1},
    "profile": "",
    "teacher": None,
}

_ENVIRONMENT = {
    "command": [
        "python",
        "-m",
        "vlpjax.main",
        "--config=experiments/contrastive/clip.py",
        "--workdir=/tmp/clip",
    ],
    "python": "3.11.7",
    "jax": "0.10.2",
    "packages": {"jax": "0.10.2", "flax": "0.12.8", "optax": "0.2.8", "grain": "0.2.18", "numpy": "2.4.6"},
    "machine": {
        "cpu": "AMD EPYC",
        "cores": 2,
        "memory_gb": 25.3,
        "platform": "Debian GNU/Linux 12 (bookworm) x86_64",
        "devices": {"platform": "cpu", "kind": "cpu", "count": 2, "processes": 1},
    },
    "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": True},
    "precision": {"compute": "float32", "reason": "CPUs multiply float32 faster than bfloat16"},
    "mesh": {"replica": 1, "fsdp": 2, "ring": 1, "ulysses": 1, "tensor": 1, "expert": 1},
    "parameters": {"image": 5_524_416, "text": 3_291_072, "clip/logit_scale": 1},
}
