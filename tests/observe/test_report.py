"""The report stands alone, escapes its data, tells right from wrong, and copes with what is missing."""

from __future__ import annotations

import json
import re
import runpy
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from vlpjax.errors import UserError
from vlpjax.observe.charts import Series, compact, line_chart, smoothed
from vlpjax.observe.markup import Markup, tag
from vlpjax.observe.report import write_report

VOID = {"meta", "img", "br", "hr"}


class Page(HTMLParser):
    """Collects elements and text, and checks that what is opened is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self._open.append(name)

    def handle_startendtag(self, name, attributes):
        self.elements.append((name, dict(attributes)))

    def handle_endtag(self, name):
        assert self._open.pop() == name

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.text += data

    def having(self, name, **wanted):
        return [given for found, given in self.elements if found == name and wanted.items() <= given.items()]


def report_page(workdir):
    return Page(write_report(workdir).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(write_fake_run, tmp_path_factory):
    return report_page(write_fake_run(tmp_path_factory.mktemp("run")))


def test_the_page_loads_nothing_and_forbids_the_network(page):
    for name, attributes in page.elements:
        assert name not in ("script", "link", "iframe", "object", "base")
        for attribute, value in attributes.items():
            assert not attribute.startswith("on")
            if attribute in ("src", "href", "xlink:href", "srcset", "action", "data"):
                assert re.match(r"#|data:image/", value), value
    (policy,) = page.having("meta", **{"http-equiv": "Content-Security-Policy"})
    assert "default-src 'none'" in policy["content"]


def test_the_style_sheet_loads_nothing_and_knows_both_themes(write_fake_run, tmp_path):
    text = write_report(write_fake_run(tmp_path)).read_text(encoding="utf-8")
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert "prefers-color-scheme: dark" in style
    assert style.count("{") == style.count("}")


def test_scores_stand_beside_chance(page):
    assert "Held-out style" in page.text
    assert "29.9%" in page.text and "477× chance" in page.text  # 0.299 against 1 of 1594.
    assert "266×" in page.text  # Median rank 3 against 797: less is better.


def test_every_curve_has_its_chart(page):
    told = " ".join(svg["aria-label"] or "" for svg in page.having("svg", role="img"))
    for title in (
        "loss:",
        "grad norm:",
        "learning rate:",
        "examples per second:",
        "input wait:",
        "clip, accuracy:",
    ):
        assert title in told
    assert "@10 " in told and "text\N{NO-BREAK SPACE}→\N{NO-BREAK SPACE}image" in told


def test_right_and_wrong_differ_by_shape_and_word_and_not_by_colour_alone(page):
    paths = [path["d"] for path in page.having("path") if "class" not in path]
    right, wrong = (
        len(page.having("span", **{"class": "mark right"})),
        len(page.having("span", **{"class": "mark wrong"})),
    )
    assert right > 5 and wrong > 5
    assert sorted({paths.count(path) for path in set(paths)}) == sorted({right, wrong})
    assert page.text.count("right ") >= right and page.text.count("wrong ") >= wrong
    assert page.having("li", **{"class": "right"}) and page.having("li", **{"class": "wrong"})


def test_a_failed_evaluator_says_so(page):
    assert "This evaluator failed at step 800: no class names for label 7" in page.text


def test_configuration_machine_and_command_are_told(page):
    for text in ("TextTransformer", "weight_decay 0.1", "AMD EPYC", "0123456789ab with uncommitted changes"):
        assert text in page.text
    assert "--config=experiments/contrastive/clip.py" in page.text


def test_captions_are_data(write_fake_run, tmp_path):
    evil = '<script>alert(1)</script> & "quotes" \''
    names = {
        f"{colour} {shape}": evil
        for colour in ("red", "blue", "green", "amber", "violet")
        for shape in ("disc", "star")
    }
    workdir = write_fake_run(tmp_path, captions=names)
    environment = json.loads((workdir / "environment.json").read_text())
    (workdir / "environment.json").write_text(json.dumps(environment | {"command": ["</code><img src=x>"]}))
    (workdir / "config.json").write_text(
        json.dumps({"name": evil, "towers": {evil: {"type": evil, "x": evil}}})
    )

    page = report_page(workdir)
    assert not page.having("script") and not page.having("img", src="x")
    assert page.text.count(evil) > 3


def test_a_picture_that_is_not_a_data_uri_is_not_loaded(write_fake_run, tmp_path):
    workdir = write_fake_run(tmp_path)
    items = [{"image": "https://example.org/a.png"}, {"image": "data:image/svg+xml;base64,PHN2Zz4="}]
    example = {"direction": "text->image", "query": {"text": "a"}, "results": items, "correct": False}
    record = {"step": 1, "title": "Odd", "metrics": {}, "chance": {}, "examples": [example]}
    (workdir / "evaluations" / "odd.json").write_text(json.dumps(record))
    page = report_page(workdir)
    assert page.text.count("picture missing") == 2
    assert not [
        image for image in page.having("img") if "example.org" in image["src"] or "svg" in image["src"]
    ]


def test_an_empty_run_has_a_report(tmp_path):
    page = report_page(tmp_path)
    assert tmp_path.name in page.text and "none yet" in page.text
    assert "No evaluator has reported yet." in page.text


def test_one_metric_line_and_a_torn_one_are_enough(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 10, "train/loss": 2.5, "train/odd": "nan"}\n{"step": 20, "tr'
    )
    page = report_page(tmp_path)
    assert [svg["aria-label"] for svg in page.having("svg", role="img")] == [
        "loss: train, loss 2.5 at step 10, 2.5 at step 10"
    ]
    assert "No finite value." in page.text


def test_scores_without_a_result_file_are_shown_from_the_metrics(tmp_path):
    lines = [
        {"step": 5, "eval/val/accuracy": 0.25},
        {"step": 9, "eval/val/accuracy": 0.5},
        {"step": 9, "eval/bad/failed": 1},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report_page(tmp_path)
    assert "50.0%" in page.text and "25.0%" not in page.text
    assert "This evaluator failed at step 9" in page.text


def test_damage_and_a_missing_directory_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="is not a directory"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        write_report(tmp_path)


def test_a_long_run_stays_a_small_page_and_keeps_its_spike(tmp_path):
    lines = [{"step": step, "train/loss": 9.0 if step == 7777 else 1.0} for step in range(20_000)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = write_report(tmp_path)
    assert path.stat().st_size < 40_000
    raw = re.search(r'<path d="M([^"]*)" class="raw"', path.read_text()).group(1)
    assert len({point.split(",")[1] for point in raw.split()}) == 2


def test_the_command_prints_the_path_or_one_sentence(tmp_path, monkeypatch, capsys):
    main = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "report.py"))["main"]
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path)])
    assert main() == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"

    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "nowhere")])
    assert main() == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_tags_escape_all_but_markup():
    assert tag("p", "<b>", Markup("<i></i>"), None, [1, "&"]) == "<p>&lt;b&gt;<i></i>1&amp;</p>"
    assert (
        tag("img", alt='"><script>', hidden=True, title=None) == '<img alt="&quot;&gt;&lt;script&gt;" hidden>'
    )


def test_smoothing_keeps_straight_lines_and_calms_noise():
    line = np.linspace(5, 1, 200)
    np.testing.assert_allclose(smoothed(line), line, atol=1e-9)  # No lag, also at both ends.
    noise = np.random.default_rng(0).standard_normal(400)
    assert smoothed(noise)[40:-40].std() < 0.35 * noise.std()
    assert smoothed(np.array([1.0, 3.0])).tolist() == [1.0, 3.0]


def test_values_that_are_not_finite_are_counted():
    chart = line_chart("loss", [Series("loss", [1, 2, 3, 4], [1.0, float("nan"), float("inf"), 2.0])])
    assert "2 values are not finite and not drawn." in chart


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.31, "0.31"),
        (3e-4, "3e-4"),
        (12.44, "12.4"),
        (465.2, "465.2"),
        (1250, "1,250"),
        (120_000, "120k"),
        (8.8e6, "8.8M"),
    ],
)
def test_numbers_are_compact(value, text):
    assert compact(value) == text
