"""Writes ``report.html``: one file that shows what a run learned, how it went, and on what it ran.

The page needs nothing but itself: pictures are data URIs, charts inline SVG, and its Content-Security-Policy
forbids the network, so it can be mailed, archived and opened years later.  Every part is optional: a run that
was stopped after one line of metrics has a report too.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vlpjax.errors import UserError
from vlpjax.observe.charts import Series, compact, line_chart
from vlpjax.observe.markup import Markup, join, tag
from vlpjax.observe.metrics import disk_full_is_told, read_jsonl
from vlpjax.observe.progress import format_duration
from vlpjax.observe.report_style import STYLE

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_PICTURE = re.compile(r"data:image/(?:png|jpeg|webp|gif|avif);base64,[A-Za-z0-9+/=]+")
_SHARE = re.compile(r"recall|accuracy|precision|average_precision|reciprocal|ndcg|top\d", re.IGNORECASE)
_LOWER_IS_BETTER = re.compile(r"(?<!reciprocal_)rank|loss|perplexity|error|distance", re.IGNORECASE)
_HEADLINE = re.compile(r"@1$|accuracy|top1", re.IGNORECASE)
_SHOWN_EXAMPLES, _SHOWN_CHARTS = 8, 18
_ARROW = "\N{NO-BREAK SPACE}→\N{NO-BREAK SPACE}"  # A line never breaks at the arrow.
_EXTRA_CHARTS = ("train/learning_rate", "train/grad_norm")


@dataclass(frozen=True)
class Evaluation:
    """The newest result of one evaluator; ``error`` says why there is none."""

    name: str
    title: str
    step: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    chance: Mapping[str, float] = field(default_factory=dict)
    examples: Sequence[Mapping[str, Any]] = ()
    error: str = ""


@dataclass(frozen=True)
class Run:
    """Everything that a work directory tells about its run."""

    name: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    timing: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Evaluation]
    finished: datetime | None


def write_report(workdir: str | os.PathLike[str]) -> Path:
    """Writes ``workdir/report.html`` from what the run left there, and returns its path.

    Raises:
        UserError: there is no such directory, a file in it is damaged, or the disk is full.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"{workdir} is not a directory; name the work directory of a run.")
    path = workdir / "report.html"
    temporary = workdir / "report.html.partial"
    page = render(read_run(workdir))
    with disk_full_is_told(path):
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
    return path


def read_run(workdir: Path) -> Run:
    """Reads a work directory; parts that are not there are empty."""
    config = _read_json(workdir / "config.json")
    metrics_path = workdir / "metrics.jsonl"
    metrics = read_jsonl(metrics_path)
    name = config.get("name")
    return Run(
        name=name if isinstance(name, str) and name else workdir.resolve().name,
        config=config,
        environment=_read_json(workdir / "environment.json"),
        metrics=metrics,
        timing=read_jsonl(workdir / "timing.jsonl"),
        evaluations=_read_evaluations(workdir / "evaluations", metrics),
        finished=datetime.fromtimestamp(metrics_path.stat().st_mtime, UTC) if metrics else None,
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(
            f"{path} is not JSON; restore it, or move it away to leave it out of the report."
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, not a JSON object.")
    return value


def _read_evaluations(directory: Path, metrics: Sequence[Mapping[str, Any]]) -> list[Evaluation]:
    """Results from ``evaluations/``, then those that only left metric lines."""
    found = [_evaluation(path.stem, _read_json(path)) for path in sorted(directory.glob("*.json"))]
    known = {one.name for one in found}
    newest: dict[str, tuple[int, dict[str, float]]] = {}
    for record in metrics:
        for key, value in record.items():
            if key.startswith("eval/") and key.count("/") >= 2:
                _, name, metric = key.split("/", 2)
                step, scores = newest.get(name, (-1, {}))
                newest[name] = (record["step"], (scores if step == record["step"] else {}) | {metric: value})
    for name, (step, scores) in sorted(newest.items()):
        if name not in known:
            error = "its metrics say that it failed" if scores.get("failed") else ""
            found.append(Evaluation(name, _words(name), step=step, metrics=scores, error=error))
    return found


def _evaluation(name: str, record: Mapping[str, Any]) -> Evaluation:
    metrics = {key: float(value) for key, value in record.get("metrics", {}).items()}
    error = str(record.get("error") or ("its metrics say that it failed" if metrics.get("failed") else ""))
    return Evaluation(
        name=name,
        title=str(record.get("title") or _words(name)),
        step=record.get("step"),
        metrics={key: value for key, value in metrics.items() if key != "failed"},
        chance={key: float(value) for key, value in record.get("chance", {}).items()},
        examples=record.get("examples", ()),
        error=error,
    )


def render(run: Run) -> str:
    """The whole page as text."""
    sections = [
        ("curves", "Curves", _curves(run)),
        ("scores", "Scores", join(_score_table(one) for one in run.evaluations)),
        ("examples", "Examples", join(_example_grids(one) for one in run.evaluations)),
        ("configuration", "Configuration", _configuration(run.config)),
        ("machine", "Machine and command", _machine(run.environment)),
        ("reading", "How to read this", _legend(run)),
    ]
    sections = [(key, title, content) for key, title, content in sections if content]
    body = [
        tag("section", tag("h2", title, id=f"{key}-title"), content, id=key, aria_labelledby=f"{key}-title")
        for key, title, content in sections
    ]
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", f"{run.name}: report"),
        tag("style", Markup(STYLE)),
    ]
    links = tag("nav", (tag("a", title, href=f"#{key}") for key, title, _ in sections), aria_label="Contents")
    footer = tag(
        "footer", "Written by vlpjax from the files of the run. This page loads nothing from anywhere."
    )
    content = tag("body", tag("header", _header(run), links), tag("main", body), footer)
    return "<!doctype html>\n" + tag("html", tag("head", head), content, lang="en") + "\n"


# --- header


def _header(run: Run) -> list[Markup]:
    facts = {
        "Steps": f"{run.metrics[-1]['step']:,}" if run.metrics else "none yet",
        "Training time": _training_time(run),
        "Examples per second": _typical_speed(run),
        "Parameters": _parameter_total(run.environment),
        "Device": _device(run.environment),
        "Last written": f"{run.finished:%Y-%m-%d %H:%M} UTC" if run.finished else "",
    }
    cards = [card for one in run.evaluations for card in _cards(one)]
    return [
        tag("h1", run.name),
        tag(
            "dl",
            (tag("div", tag("dt", key), tag("dd", value)) for key, value in facts.items() if value),
            class_="facts",
        ),
        tag("ul", cards, class_="cards")
        if cards
        else tag("p", "No evaluator has reported yet.", class_="empty"),
    ]


def _training_time(run: Run) -> str:
    seconds = [record["seconds"] for record in run.timing if "seconds" in record]
    return format_duration(seconds[-1]) if seconds else ""


def _typical_speed(run: Run) -> str:
    speeds = sorted(record.get("examples_per_second", math.nan) for record in run.timing)
    speeds = [speed for speed in speeds if math.isfinite(speed)]
    return compact(speeds[len(speeds) // 2]) if speeds else ""


def _parameter_total(environment: Mapping[str, Any]) -> str:
    counts = environment.get("parameters") or {}
    return compact(sum(counts.values())) if counts else ""


def _device(environment: Mapping[str, Any]) -> str:
    devices = environment.get("machine", {}).get("devices")
    if isinstance(devices, Mapping):
        return f"{devices.get('count', 1)} × {devices.get('kind', 'unknown')}"
    return ", ".join(map(str, devices)) if isinstance(devices, (list, tuple)) else str(devices or "")


def _cards(evaluation: Evaluation) -> Iterable[Markup]:
    """At most two headline scores of an evaluator, or the word that it failed."""
    of = tag("span", evaluation.title, class_="of")
    if evaluation.error:
        what = tag("span", of, "no score", class_="what")
        yield tag(
            "li",
            what,
            tag("span", "failed", class_="value failed"),
            tag("span", "see Scores", class_="against"),
        )
        return
    with_chance = [name for name in evaluation.metrics if name in evaluation.chance] or list(
        evaluation.metrics
    )
    for name in ([name for name in with_chance if _HEADLINE.search(name)] or with_chance)[:2]:
        value, chance = evaluation.metrics[name], evaluation.chance.get(name)
        against = "" if chance is None else f"{_times_chance(name, value, chance)} chance"
        yield tag(
            "li",
            tag("span", of, _words(name), class_="what"),
            tag("span", _score(name, value), class_="value"),
            tag("span", against, class_="against"),
        )


# --- curves


def _curves(run: Run) -> Markup:
    training = _series(run.metrics, lambda key: not key.startswith("eval/"))
    timing = _series(run.timing, lambda key: key in ("examples_per_second", "input_wait"))
    order = sorted(
        training, key=lambda key: (key != "train/loss", key in _EXTRA_CHARTS, not key.endswith("loss"), key)
    )
    charts = [_training_chart(key, training[key]) for key in order]
    charts += [_training_chart(key, series) for key, series in timing.items()]
    shown = [tag("h3", "Training"), tag("div", charts[:_SHOWN_CHARTS], class_="charts")] if charts else []
    if len(charts) > _SHOWN_CHARTS:
        rest = tag("div", charts[_SHOWN_CHARTS:], class_="charts")
        summary = tag("summary", f"{len(charts) - _SHOWN_CHARTS} more")
        shown.append(tag("details", summary, rest, class_="more"))
    for evaluation in run.evaluations:
        if scores := list(_score_charts(evaluation, run.metrics)):
            shown += [tag("h3", evaluation.title), tag("div", scores, class_="charts")]
    return join(shown) if shown else tag("p", "This run has not written any metric yet.", class_="empty")


def _series(records: Sequence[Mapping[str, Any]], wanted: Callable[[str], bool]) -> dict[str, Series]:
    columns: dict[str, tuple[list[float], list[float]]] = {}
    for record in records:
        for key, value in record.items():
            if key != "step" and wanted(key):
                steps, values = columns.setdefault(key, ([], []))
                steps.append(record["step"])
                values.append(value)
    return {key: Series(_words(key), *columns[key]) for key in sorted(columns)}


def _training_chart(key: str, series: Series) -> Markup:
    share = key == "input_wait" or _is_share(key, series.values)
    return line_chart(
        _words(key.removeprefix("train/")),
        [series],
        smooth=not key.endswith("learning_rate"),
        percent=share,
        from_zero=share or key in ("examples_per_second", *_EXTRA_CHARTS),
    )


def _score_charts(evaluation: Evaluation, records: Sequence[Mapping[str, Any]]) -> Iterable[Markup]:
    """One chart per family of scores: recall@1, @5 and @10 of a direction share theirs."""
    prefix = f"eval/{evaluation.name}/"
    found = {
        key.removeprefix(prefix): one for key, one in _series(records, lambda k: k.startswith(prefix)).items()
    }
    order = list(evaluation.metrics)  # As the evaluator lists them, which the table below follows too.
    families: dict[str, list[str]] = {}
    for metric in sorted(found, key=lambda metric: order.index(metric) if metric in order else len(order)):
        if metric != "failed":
            families.setdefault(metric.split("@")[0], []).append(metric)
    for family, members in families.items():
        members.sort(key=lambda metric: [int(digits) for digits in re.findall(r"@(\d+)", metric)])
        several = len(members) > 1
        yield line_chart(
            _words(family if several else members[0]),
            [replace(found[metric], name=metric[len(family) :] or _words(metric)) for metric in members],
            percent=all(_is_share(metric, found[metric].values) for metric in members),
            from_zero=True,
            reference=None if several else evaluation.chance.get(members[0]),
        )


# --- scores


def _score_table(evaluation: Evaluation) -> list[Markup | None]:
    step = f" at step {evaluation.step:,}" if isinstance(evaluation.step, int) else ""
    heading = tag("h3", evaluation.title)
    failure = None
    if evaluation.error:
        failure = tag(
            "p", tag("strong", f"This evaluator failed{step}: "), evaluation.error, class_="failure"
        )
    if not evaluation.metrics:
        return [heading, failure or tag("p", "No score yet.", class_="empty")]
    names = ("Metric", "Value", "Chance", "× chance")
    head = tag(
        "tr", (tag("th", name, scope="col", class_="number" if name != "Metric" else None) for name in names)
    )
    rows = [
        _score_row(name, value, evaluation.chance.get(name)) for name, value in evaluation.metrics.items()
    ]
    table = tag("table", tag("thead", head), tag("tbody", rows))
    note = tag("p", f"Measured{step}.", class_="warning") if step else None
    return [heading, failure, tag("div", table, class_="scroll"), note]


def _score_row(name: str, value: float, chance: float | None) -> Markup:
    none = tag("span", "–", class_="quiet")
    return tag(
        "tr",
        tag("th", _words(name), scope="row"),
        tag("td", _score(name, value), class_="number"),
        tag("td", none if chance is None else _score(name, chance), class_="number"),
        tag("td", none if chance is None else _times_chance(name, value, chance), class_="number"),
    )


def _is_share(name: str, values: Iterable[float]) -> bool:
    return bool(_SHARE.search(name)) and all(0 <= value <= 1 for value in values if math.isfinite(value))


def _score(name: str, value: float) -> str:
    if _is_share(name, [value]) and math.isfinite(value):
        share = value * 100
        return f"{share:.1f}%" if share >= 1 or share == 0 else f"{share:.2g}%"
    return compact(value)


def _times_chance(name: str, value: float, chance: float) -> str:
    """How many times better than guessing; for ranks and losses, where less is better, the inverse."""
    above, below = (chance, value) if _LOWER_IS_BETTER.search(name) else (value, chance)
    if below == 0 or not math.isfinite(above) or not math.isfinite(below):
        return "–"
    times = above / below
    return f"{times:,.0f}×" if times >= 10 else f"{times:.1f}×"


# --- examples: what was retrieved, and rows of pictures


def _example_grids(evaluation: Evaluation) -> list[Markup]:
    rows = [example["pictures"] for example in evaluation.examples if "pictures" in example]
    if rows:
        return [tag("h3", evaluation.title), tag("ul", map(_pictures, rows), class_="examples")]
    directions: dict[str, list[Mapping[str, Any]]] = {}
    for example in evaluation.examples:
        directions.setdefault(str(example.get("direction", "")), []).append(example)
    if not directions:
        return []
    columns = []
    for direction, examples in directions.items():
        right = sum(bool(example.get("correct")) for example in examples)
        heading = tag("h4", f"{_words(direction)}: best answer right in {right} of {len(examples)}")
        shown = [heading, tag("ul", map(_example, examples[:_SHOWN_EXAMPLES]), class_="examples")]
        if len(examples) > _SHOWN_EXAMPLES:
            rest = tag("ul", map(_example, examples[_SHOWN_EXAMPLES:]), class_="examples")
            summary = tag("summary", f"{len(examples) - _SHOWN_EXAMPLES} more")
            shown.append(tag("details", summary, rest, class_="more"))
        columns.append(tag("div", shown))
    return [tag("h3", evaluation.title), tag("div", columns, class_="directions")]


def _pictures(pictures: Sequence[Mapping[str, Any]]) -> Markup:
    items = (tag("li", _item(one, "result")) for one in pictures)
    return tag("li", tag("ol", items, class_="results pictures"), class_="example")


def _example(example: Mapping[str, Any]) -> Markup:
    results = list(example.get("results", ()))[:5]
    pictures = any("image" in result for result in results)
    query = tag("div", _item(example.get("query", {}), "query"), _verdict(results), class_="query")
    answers = tag("ol", map(_result, results), class_="results pictures" if pictures else "results texts")
    return tag("li", query, answers, class_="example")


def _result(result: Mapping[str, Any]) -> Markup:
    right = bool(result.get("correct"))
    score = result.get("score")
    mark = _mark(right, "" if score is None else f"{float(score):.2f}")
    content = _item(result, "result")
    # Pictures stand above their score, texts behind it.
    return tag(
        "li", [content, mark] if "image" in result else [mark, content], class_="right" if right else "wrong"
    )


def _verdict(results: Sequence[Mapping[str, Any]]) -> Markup:
    place = next((number for number, result in enumerate(results, 1) if result.get("correct")), None)
    if place is None:
        return tag("div", _mark(False, f"not in best {len(results)}"), class_="verdict")
    return tag("div", _mark(place == 1, "best" if place == 1 else f"found at {place}"), class_="verdict")


def _mark(right: bool, text: str) -> Markup:
    """A tick or a cross, so that right and wrong differ by more than their colour."""
    drawing = "M1 5.5 L4 8.5 L9 1.5" if right else "M1.5 1.5 L8.5 8.5 M8.5 1.5 L1.5 8.5"
    sign = tag("svg", tag("path", d=drawing), viewBox="0 0 10 10", aria_hidden="true")
    word = "right" if right else "wrong"
    return tag("span", sign, tag("span", f"{word} ", class_="spoken"), text, class_=f"mark {word}")


def _item(item: Mapping[str, Any], role: str) -> Markup:
    text = str(item["text"]) if item.get("text") else ""
    if "image" not in item:
        return tag("p" if role == "query" else "span", text)
    source = str(item["image"])
    if not _PICTURE.fullmatch(source):
        return tag("span", text or "picture missing", class_="quiet")
    caption = tag("div", text, class_="caption") if text else None
    alt = text or f"{role} picture"
    return join([tag("img", src=source, alt=alt, title=text or None, loading="lazy"), caption])


# --- configuration and machine


def _configuration(config: Mapping[str, Any]) -> Markup | None:
    if not config:
        return None
    return tag("div", (_branch(key, value) for key, value in config.items()), class_="tree")


def _branch(key: str, value: Any) -> Markup:
    name = tag("span", key, class_="key")
    if isinstance(value, Mapping) and value:
        kind = str(value.get("type", "")) if isinstance(value.get("type"), str) else ""
        inner = {inner_key: inner for inner_key, inner in value.items() if inner_key != "type" or not kind}
        title = tag("span", kind.rpartition(":")[2], class_="type", title=kind) if kind else None
        if not inner:
            return tag("div", name, " ", title)
        summary = tag("summary", name, " ", title)
        return tag(
            "details", summary, (_branch(inner_key, inner_value) for inner_key, inner_value in inner.items())
        )
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return tag(
            "details", tag("summary", name), (_branch(str(place), item) for place, item in enumerate(value))
        )
    return tag("div", name, " ", json.dumps(value, ensure_ascii=False))


def _machine(environment: Mapping[str, Any]) -> Markup | None:
    if not environment:
        return None
    machine = environment.get("machine", {})
    devices = machine.get("devices", {})
    processes = devices.get("processes") if isinstance(devices, Mapping) else None
    memory = machine.get("memory_gb")
    git = environment.get("git")
    here = {
        "Processor": machine.get("cpu"),
        "Cores": machine.get("cores"),
        "Memory": f"{memory} GB" if memory is not None else None,
        "System": machine.get("platform"),
        "Devices": _device(environment),
        "Processes": processes,
        "Mesh": _pairs_in_words(environment.get("mesh")),
        "Precision": _precision(environment.get("precision")),
        "Commit": _commit(git),
    }
    versions = {"Python": environment.get("python")} | dict(environment.get("packages", {}))
    parameters = {name: f"{count:,}" for name, count in (environment.get("parameters") or {}).items()}
    command = shlex.join(map(str, environment.get("command", ())))
    columns = [_pairs("Machine", here), _pairs("Parameters", parameters), _pairs("Versions", versions)]
    return join(
        [tag("pre", tag("code", command)) if command else None, tag("div", columns, class_="columns")]
    )


def _pairs(title: str, values: Mapping[str, Any]) -> Markup | None:
    rows = [(tag("dt", key), tag("dd", value)) for key, value in values.items() if value not in (None, "")]
    return tag("div", tag("h4", title), tag("dl", rows, class_="pairs")) if rows else None


def _pairs_in_words(values: Any) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items()) if isinstance(values, Mapping) else ""


def _precision(precision: Any) -> str:
    if not isinstance(precision, Mapping):
        return str(precision or "")
    return ": ".join(str(precision[key]) for key in ("compute", "reason") if precision.get(key))


def _commit(git: Any) -> str:
    if not isinstance(git, Mapping):
        return str(git or "")
    return str(git.get("commit", ""))[:12] + (" with uncommitted changes" if git.get("dirty") else "")


# --- words


def _legend(run: Run) -> Markup:
    texts = [
        "Charts have training steps along the bottom. The strong line is a local fit over a tenth of the "
        "points, the faint one the values themselves; scores of evaluators are not smoothed.",
        "“Chance” is what guessing would score on the same task, and “× chance” how far the run is above "
        "it. For ranks and losses, where less is better, it is chance divided by the value.",
    ]
    if any(one.examples for one in run.evaluations):
        texts.append(
            "Each retrieval example asks with one item; its five best answers follow, best first, with their "
            "score. A tick marks a right answer, a cross a wrong one."
        )
    texts.append(
        "Training time leaves out compiling, evaluating and saving; waiting for input is part of it."
    )
    return join(tag("p", text) for text in texts)


def _words(key: str) -> str:
    """``text_to_image/recall@1`` -> ``text → image, recall@1``."""
    arrows = key.replace("->", _ARROW).replace("_to_", _ARROW)
    return ", ".join(part.replace("_", " ") for part in arrows.split("/")).strip()
