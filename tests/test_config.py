"""Configs: wrong names and types are told where they are written, and what was written comes back unchanged."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlpjax.config import Config, apply_overrides, build, differences, from_json, leaves, load, spec, to_json
from vlpjax.errors import UserError


@dataclass(frozen=True)
class Inner:
    width: int = 3
    rate: float = 0.5


@dataclass(frozen=True)
class Other:
    rate: float = 0.25
    height: int = 7


@dataclass(frozen=True)
class Outer:
    count: int
    rate: float = 1.0
    flag: bool = False
    name: str = "plain"
    pair: tuple[int, int] = (1, 2)
    many: tuple[str, ...] = ()
    maybe: int | None = None
    label: str | None = None
    kind: Literal["a", "b"] = "a"
    inner: Inner = field(default_factory=Inner)
    parts: Any = ()


def function(*, base: float = 10.0, exponent: int = 2) -> float:
    return base**exponent


def test_defaults_are_written_out() -> None:
    described = spec(Outer, count=2)
    assert described.type.endswith(":Outer")
    assert {name: described[name] for name in described if name != "type"} == dict(
        count=2,
        rate=1.0,
        flag=False,
        name="plain",
        pair=(1, 2),
        many=(),
        maybe=None,
        label=None,
        kind="a",
        parts=(),
    )


def test_an_unknown_name_is_told_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"Outer has no field 'cuont'; did you mean 'count'\?"):
        spec(Outer, cuont=2)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("count", 1.5, "int"),
        ("count", True, "int"),
        ("count", "1", "int"),
        ("count", None, "int"),
        ("rate", "fast", "float"),
        ("rate", True, "float"),
        ("flag", 1, "bool"),
        ("flag", "true", "bool"),
        ("name", 3, "str"),
        ("pair", (1,), "tuple"),
        ("pair", (1, "2"), "tuple"),
        ("pair", 1, "tuple"),
        ("many", "word", "tuple"),
        ("many", ("word", 2), "tuple"),
        ("maybe", "none", "int | None"),
        ("maybe", 1.5, "int | None"),
        ("kind", "c", "Literal"),
        ("inner", 3, "Inner"),
        ("inner", (1, 2), "Inner"),
    ],
)
def test_a_wrong_type_is_told(name: str, value: Any, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        spec(Outer, **{"count": 1, name: value})
    for part in (f"Outer.{name}", repr(value), expected):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rate", 2),
        ("maybe", 4),
        ("maybe", None),
        ("pair", [3, 4]),
        ("many", ("a", "b")),
        ("kind", "b"),
        ("parts", {"a": 1}),
    ],
)
def test_a_right_type_is_taken(name: str, value: Any) -> None:
    stored = spec(Outer, **{"count": 1, name: value})[name]
    assert stored == (tuple(value) if isinstance(value, list) else value) or dict(stored) == value


def test_build_makes_what_is_inside_first() -> None:
    described = spec(
        Outer,
        count=1,
        inner=spec(Inner, width=5),
        parts=dict(first=spec(Inner), rest=(spec(function, base=3.0), 4)),
    )
    built = build(described)
    assert built == Outer(1, inner=Inner(5), parts={"first": Inner(), "rest": (9.0, 4)})


def test_what_only_the_program_knows_is_given_to_build() -> None:
    described = spec(Outer)
    with pytest.raises(UserError, match="Outer needs 'count'"):
        build(described)
    assert build(described, count=3).count == 3


def test_a_field_that_was_set_later_is_checked_when_the_object_is_made() -> None:
    described = spec(Outer, count=1)
    described.cuont = 2
    with pytest.raises(UserError, match="no field 'cuont'; did you mean 'count'"):
        build(described)
    described = spec(Outer, count=1)
    described.maybe = "many"
    with pytest.raises(UserError, match=r"Outer\.maybe is 'many'"):
        build(described)


def test_targets_that_cannot_be_imported_are_told() -> None:
    with pytest.raises(UserError, match="top level of an importable module"):
        spec(lambda: 1)
    with pytest.raises(UserError, match="no module 'nowhere'"):
        build(Config(type="nowhere:Thing"))
    with pytest.raises(UserError, match=r"no 'Confg'; did you mean 'Config'"):
        build(Config(type="vlpjax.config:Confg"))


names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=6).filter(
    lambda name: name != "type" and not name.startswith("_") and not hasattr(Config(), name)
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(names, values, max_size=5))
def test_json_brings_back_the_same_config_in_the_same_order(fields: dict[str, Any]) -> None:
    config = Config(fields)
    restored = from_json(to_json(config))
    assert restored == config
    assert list(leaves(restored)) == list(leaves(config))
    assert not differences(config, restored)


def test_the_order_in_which_fields_are_written_is_kept_at_every_depth() -> None:
    config = Config(zebra=1, apple=dict(yak=1, bee=(dict(z=1, a=2),)))
    config.mango = dict(second=2, first=1)
    for same in (config, from_json(to_json(config))):
        assert [path for path, _ in leaves(same)] == [
            "zebra",
            "apple.yak",
            "apple.bee",
            "mango.second",
            "mango.first",
        ]
        assert list(same.apple.bee[0]) == ["z", "a"]


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("part.count", "7", 7),
        ("part.rate", "1e-3", 1e-3),
        ("part.rate", "2", 2.0),
        ("part.flag", "true", True),
        ("part.flag", "False", False),
        ("part.name", "7", "7"),
        ("part.name", "a,b", "a,b"),
        ("part.pair", "(3, 4)", (3, 4)),
        ("part.pair", "[3, 4]", (3, 4)),
        ("part.pair", "3,4", (3, 4)),
        ("part.many", "('x', 'y')", ("x", "y")),
        ("part.many", "()", ()),
        ("part.maybe", "3", 3),
        ("part.label", "None", None),
        ("part.label", "None of these", "None of these"),
        ("part.kind", "b", "b"),
        ("part.inner.width", "9", 9),
        ("free", "5", 5),
        ("words", "hello", "hello"),
    ],
)
def test_an_override_has_the_type_of_its_leaf(path: str, text: str, value: Any) -> None:
    config = Config(part=spec(Outer, count=1, inner=spec(Inner)), free=1, words="")
    apply_overrides(config, [(path, text)])
    node: Any = config
    for key in path.split("."):
        node = node[key]
    assert node == value
    assert type(node) is type(value)


@pytest.mark.parametrize(
    ("path", "text", "parts"),
    [
        ("part.count", "many", ["config.part.count", "'many'", "int", "1"]),
        ("part.count", "1.5", ["int"]),
        ("part.flag", "1", ["bool"]),
        ("part.maybe", "few", ["int | None"]),
        ("part.pair", "(1, 2, 3)", ["config.part.pair", "tuple"]),
        ("part.kind", "c", ["'c'"]),
        ("part.cuont", "1", ["config.part", "'cuont'", "'count'"]),
        ("prat.count", "1", ["'prat'", "'part'"]),
        ("part.count.more", "1", ["config.part.count", "'more'"]),
        ("part.type", "x:Y", ["'type'"]),
        ("group", "1", ["config.group", "group", "'one'"]),
    ],
)
def test_a_wrong_override_is_told(path: str, text: str, parts: list[str]) -> None:
    config = Config(part=spec(Outer, count=1), group=dict(one=1))
    with pytest.raises(UserError) as caught:
        apply_overrides(config, [(path, text)])
    assert all(part in str(caught.value) for part in parts), caught.value


def test_none_can_be_set_and_unset() -> None:
    config = Config(part=spec(Outer, count=1))
    apply_overrides(config, [("part.maybe", "3"), ("part.maybe", "None")])
    assert config.part.maybe is None


def test_a_spec_is_replaced_by_its_import_path_and_keeps_what_both_have() -> None:
    config = Config(part=spec(Outer, count=1, inner=spec(Inner, rate=0.75)))
    apply_overrides(config, [("part.inner", f"{Other.__module__}:Other"), ("part.inner.height", "8")])
    assert build(config.part).inner == Other(rate=0.75, height=8)


def test_differences_name_every_leaf_on_either_side() -> None:
    ours = Config(a=1, b=dict(c=2, d=(1, 2)), same="x")
    theirs = Config(a=1, b=dict(c=3), same="x", e=None, f=4)
    assert differences(ours, theirs) == [("b.c", 2, 3), ("b.d", (1, 2), None), ("f", None, 4)]


def test_every_leaf_prints_in_one_line_with_the_configs_inside_it() -> None:
    config = Config(rules=(("tpu-.*", {"mesh.fsdp": 8, "options": ("a=1",)}),), part=spec(Inner), empty={})
    printed = {path: repr(value) for path, value in leaves(config)}
    assert printed["rules"] == "(('tpu-.*', {'mesh.fsdp': 8, 'options': ('a=1',)}),)"
    assert printed["empty"] == "{}"


EXPERIMENT = """
from vlpjax.config import Config

def get_config(size="small", depth=1, wide=False):
    return Config(size=size, depth=depth, wide=wide)
"""


def test_an_experiment_takes_arguments(tmp_path: Path) -> None:
    path = tmp_path / "experiment.py"
    path.write_text(EXPERIMENT)
    assert load(str(path)) == Config(size="small", depth=1, wide=False)
    assert load(f"{path}:large") == Config(size="large", depth=1, wide=False)
    assert load(f"{path}:large,depth=3,wide=True") == Config(size="large", depth=3, wide=True)
    with pytest.raises(UserError, match=r"no argument 'dept'; did you mean 'depth'"):
        load(f"{path}:dept=3")


@pytest.mark.parametrize("constant", ["SIZES", "SPLITS"])
def test_an_experiment_is_given_no_size_that_it_does_not_list(tmp_path: Path, constant: str) -> None:
    path = tmp_path / "experiment.py"
    path.write_text(f'{EXPERIMENT}\n{constant} = ("small", "large")\n')
    assert load(f"{path}:large").size == "large"
    assert load(f"{path}:depth=3").size == "small"
    for argument in ("larg", "size=larg,depth=3"):
        with pytest.raises(UserError, match=r"experiment\.py' has no size 'larg'; did you mean 'large'"):
            load(f"{path}:{argument}")


def test_what_is_no_experiment_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no experiment file '.*nothing\.py'"):
        load(str(tmp_path / "nothing.py"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match=r"empty\.py' has no function get_config"):
        load(str(tmp_path / "empty.py"))
    (tmp_path / "plain.py").write_text("def get_config():\n    return {}\n")
    with pytest.raises(UserError, match=r"takes no argument.*'large'"):
        load(f"{tmp_path / 'plain.py'}:large")
