"""A work directory belongs to one experiment, also when the program has grown since it was made."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any

import pytest

from vlpjax.config import Config, build, complete, spec
from vlpjax.errors import UserError
from vlpjax.experiment import base_config
from vlpjax.workdir import claim, read_config


@dataclass(frozen=True)
class Part:
    """What the tests describe; they put an older or a newer class in its place."""

    width: int = 3


@dataclass(frozen=True)
class Whole:
    """A part inside a tuple inside a dict, as deep as configs go."""

    parts: Any = ()


def config_of(**fields: Any) -> Config:
    config = base_config()
    config.optimizer = spec(Whole, parts=(dict(first=spec(Part, **fields)),))
    config.evaluators = dict(look=spec(Part))
    return config


def now_has(monkeypatch: pytest.MonkeyPatch, **defaults: Any) -> None:
    """From here on ``Part`` is a class with these fields."""
    fields = [(name, type(value), value) for name, value in defaults.items()]
    newer = make_dataclass("Part", fields, frozen=True, namespace={"__module__": __name__})
    monkeypatch.setitem(globals(), "Part", newer)


def stored(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "config.json").read_text())


def change(workdir: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    config = stored(workdir)
    edit(config)
    (workdir / "config.json").write_text(json.dumps(config))


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """A run of the class as this file defines it."""
    claim(tmp_path / "run", config_of()).close()
    return tmp_path / "run"


def test_a_field_that_a_class_gained_changes_nothing(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_has(monkeypatch, width=3, depth=5)
    assert "depth" not in json.dumps(stored(workdir))
    read = read_config(workdir).optimizer.parts[0].first
    assert {name: read[name] for name in read} == dict(type=f"{__name__}:Part", width=3, depth=5)
    claim(workdir, config_of()).close()
    assert stored(workdir)["optimizer"]["parts"][0]["first"]["depth"] == 5


def test_a_gained_field_that_is_set_is_another_experiment(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_has(monkeypatch, width=3, depth=5)
    with pytest.raises(
        UserError, match=r"config.optimizer.parts\[0\].first.depth is 5 there and 6 here; choose"
    ):
        claim(workdir, config_of(depth=6))


def test_a_default_that_changed_is_another_experiment(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_has(monkeypatch, width=4)
    with pytest.raises(UserError, match="belongs to another experiment"):
        claim(workdir, config_of())


def test_a_field_that_a_class_lost_is_told(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_has(monkeypatch, breadth=3)
    sentence = (
        r"config.json is of another version of the program \(config.optimizer.parts\[0\].first: Part has no field "
        r"'width'; did you mean 'breadth'\? \(known: breadth\)\); continue with that version, or choose another"
    )
    for read in (lambda: read_config(workdir), lambda: claim(workdir, config_of())):
        with pytest.raises(UserError, match=sentence):
            read()


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        (f"{__name__}:Pert", "has no 'Pert'; did you mean 'Part'"),
        ("vlpjax.nowhere:Part", "there is no module 'vlpjax.nowhere'"),
    ],
)
def test_a_class_that_is_no_more_is_told(workdir: Path, path: str, reason: str) -> None:
    change(workdir, lambda config: config["optimizer"].update(type=path))
    with pytest.raises(UserError, match=f"another version of the program.*config.optimizer: .*{reason}"):
        claim(workdir, config_of())


def test_evaluators_may_change_and_so_may_vanish(workdir: Path) -> None:
    change(workdir, lambda config: config["evaluators"]["look"].update(type="vlpjax.nowhere:Part"))
    claim(workdir, config_of()).close()
    assert stored(workdir)["evaluators"]["look"]["type"] == f"{__name__}:Part"


def test_a_setting_that_every_experiment_gained_changes_nothing(workdir: Path) -> None:
    def older(config: dict[str, Any]) -> None:
        del config["accumulate"], config["teachers"], config["start"]["rules"], config["log"]

    change(workdir, older)
    assert read_config(workdir) == complete(config_of())
    claim(workdir, config_of()).close()
    change(workdir, lambda config: config.update(acumulate=2))
    with pytest.raises(
        UserError, match="config has no field 'acumulate' any more; did you mean 'accumulate'"
    ):
        claim(workdir, config_of())


def test_a_spec_that_was_written_by_hand_belongs_to_its_own_run(tmp_path: Path) -> None:
    config = config_of()
    config.optimizer = {"type": f"{__name__}:Whole"}
    for _ in range(2):
        claim(tmp_path / "run", config).close()


def test_completing_describes_the_same_object() -> None:
    config = config_of(width=7)
    assert complete(config) == config
    assert list(complete(config).optimizer) == list(config.optimizer)
    bare = Config({"one": {"type": f"{__name__}:Part"}, "two": 2, "three": ()})
    assert complete(bare) == Config(one=spec(Part), two=2, three=())
    assert build(complete(bare)) == build(bare)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"null"])
def test_a_damaged_config_is_told(workdir: Path, content: bytes) -> None:
    (workdir / "config.json").write_bytes(content)
    with pytest.raises(UserError, match="config.json is damaged"):
        read_config(workdir)
    with pytest.raises(UserError, match="config.json is damaged"):
        claim(workdir, config_of())


def test_a_failed_claim_leaves_the_directory_to_others(workdir: Path) -> None:
    with claim(workdir, config_of()), pytest.raises(UserError, match="Another process is training in"):
        claim(workdir, config_of())
    claim(workdir, config_of()).close()
