"""Configurations: typed descriptions of objects, checked where they are written.

``spec(ViT, width=384)`` describes an object without making it: the class's import path and its arguments,
defaults included, in an ``ml_collections.ConfigDict``.  ``build`` makes it.  There is no registry: whatever
can be imported can be named, a user's own class in a user's own module as well as ours.  Because every
argument is a leaf, every leaf can be changed on the command line, printed, compared and stored as JSON.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import json
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vlpjax.errors import UserError

__all__ = [
    "Config",
    "apply_overrides",
    "build",
    "complete",
    "differences",
    "from_json",
    "leaves",
    "load",
    "spec",
    "to_json",
]

TYPE = "type"  # the key that holds the import path of what a spec describes


class Config(ConfigDict):
    """A ``ConfigDict`` that keeps the order in which its fields were written, at every depth."""

    def __init__(self, fields: Mapping[str, Any] | None = None, **more: Any):
        # Types are checked against the described class, when a config is built; keys may be leaves' paths.
        super().__init__(sort_keys=False, allow_dotted_keys=True, type_safe=False)
        for key, value in {**(fields or {}), **more}.items():
            self[key] = value

    def __setattr__(self, key: str, value: Any) -> None:
        super().__setattr__(key, value if key.startswith("_") else _ordered(value))

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, _ordered(value))

    def __repr__(self) -> str:
        """As a dict's, in one line, because it may stand inside a leaf; ``str`` is ``ConfigDict``'s, over several."""
        return repr({key: self[key] for key in self})


def _ordered(value: Any) -> Any:
    if isinstance(value, (dict, ConfigDict)) and not isinstance(value, Config):
        return Config({key: value[key] for key in value})
    if isinstance(value, (list, tuple)):
        return tuple(_ordered(item) for item in value)
    return value


def spec(target: Callable[..., Any], /, **arguments: Any) -> Config:
    """Describes ``target(**arguments)``, to be made later by :func:`build`.

    Args:
      target: a class or function that stands at the top level of an importable module.
      **arguments: its keyword arguments.  Values are JSON-like, or specs themselves, or dicts and tuples
        of these.

    Returns:
      a ``Config`` of the import path and all arguments, with the defaults of those that were not given.

    Raises:
      UserError: an argument that ``target`` does not take (with the nearest name), a value of the wrong
        type, or a target that cannot be imported by name.
    """
    path = _import_path(target)
    parameters = _parameters(target)
    hints = _type_hints(target)
    described = Config({TYPE: path})
    for name in arguments:
        if name not in parameters:
            raise UserError(f"{_short(path)} has no field {name!r}{suggest(name, parameters)}.")
    for name, parameter in parameters.items():
        if name in arguments:
            described[name] = _checked(arguments[name], hints.get(name, Any), f"{_short(path)}.{name}")
        elif parameter.default is not parameter.empty and _is_plain(parameter.default):
            described[name] = parameter.default
    return described


def build(node: Any, **more: Any) -> Any:
    """Makes what a spec describes, the specs inside its arguments first.

    A plain ``Config`` becomes a dict of built values, a tuple a tuple of built values.  ``more`` are
    arguments that only the program knows (a mesh, a number of steps).
    """
    if isinstance(node, ConfigDict):
        if TYPE not in node:
            return {key: build(node[key]) for key in node}
        target = resolve(node[TYPE])
        _check_fields(node, target)  # once more: a field may have been set since it was described
        arguments = {key: build(node[key]) for key in node if key != TYPE} | more
        missing = [
            name
            for name, parameter in _parameters(target).items()
            if parameter.default is parameter.empty and name not in arguments
        ]
        if missing:
            raise UserError(
                f"{_short(node[TYPE])} needs {' and '.join(map(repr, missing))}; the config sets no value."
            )
        return target(**arguments)
    if isinstance(node, (tuple, list)):
        return tuple(build(item) for item in node)
    return node


def _check_fields(node: ConfigDict, target: Callable[..., Any]) -> None:
    """Raises ``UserError`` for a field that ``target`` does not take, or a value of the wrong type."""
    hints, parameters = _type_hints(target), _parameters(target)
    for name in node:
        if name == TYPE:
            continue
        if name not in parameters:
            raise UserError(f"{_short(node[TYPE])} has no field {name!r}{suggest(name, parameters)}.")
        _checked(node[name], hints.get(name, Any), f"{_short(node[TYPE])}.{name}")


def resolve(path: str) -> Callable[..., Any]:
    """The class or function at ``"package.module:Name"``."""
    module_name, colon, qualified_name = path.partition(":")
    if not colon:
        raise UserError(f"{path!r} is not an import path; write it as 'package.module:Name'.")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"The config names {path!r}, but there is no module {error.name!r}.") from error
    for name in qualified_name.split("."):
        if not hasattr(found, name):
            raise UserError(f"The module {module_name} has no {qualified_name!r}{suggest(name, dir(found))}.")
        found = getattr(found, name)
    return found


def load(file_and_argument: str) -> Config:
    """Runs ``get_config`` of ``FILE.py[:argument[,name=value...]]`` and returns the checked config.

    The first bare argument goes to ``get_config``'s first parameter (by custom ``size``).  A file that lists the values
    which that parameter takes, in a constant ``SIZES`` or ``SPLITS``, is given no other.
    """
    file, _, text = file_and_argument.partition(":")
    path = Path(file)
    if not path.is_file():
        raise UserError(
            f"There is no experiment file {file!r}; give the path of a Python file with get_config()."
        )
    module_spec = importlib.util.spec_from_file_location(f"_experiment_{path.stem}", path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"The experiment file {file!r} has no function get_config().")
    parameters = inspect.signature(module.get_config).parameters
    arguments: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        name, equals, value = item.partition("=")
        if not equals:
            name, value = next(iter(parameters), item), item
        if name not in parameters:
            raise UserError(
                f"get_config() of {file!r} takes no argument {name!r}{suggest(name, parameters)}."
            )
        arguments[name] = _literal(value)
    first, listed = next(iter(parameters), ""), getattr(module, "SIZES", getattr(module, "SPLITS", ()))
    if listed and arguments.get(first, listed[0]) not in listed:
        wrong = str(arguments[first])
        raise UserError(f"The experiment file {file!r} has no {first} {wrong!r}{suggest(wrong, listed)}.")
    config = module.get_config(**arguments)
    return config if isinstance(config, Config) else Config({key: config[key] for key in config})


def apply_overrides(config: Config, overrides: Sequence[tuple[str, str]]) -> Config:
    """Sets leaves by dotted path, from text, with the type that the leaf has; returns the same config.

    A spec itself can be replaced: ``objectives.clip.loss=vlpjax.objectives.contrastive:Sigmoid`` describes
    the other class and keeps the arguments that both have.

    Raises:
      UserError: an unknown path (with the nearest one), or a text that is not of the leaf's type.
    """
    for dotted, text in overrides:
        parent, key = _descend(config, dotted)
        current = parent[key]
        if isinstance(current, ConfigDict):
            if TYPE not in current:
                raise UserError(f"config.{dotted} is a group; set one of its fields {sorted(current)}.")
            target = resolve(text)
            kept = {name: current[name] for name in current if name in _parameters(target)}
            # Assigned through the mapping: a field's type changes from one spec to another on purpose.
            parent[key] = spec(target, **kept)
            continue
        hint = _type_hints(resolve(parent[TYPE])).get(key, Any) if TYPE in parent else Any
        value = _parse(text, current, hint, f"config.{dotted}")
        parent[key] = value
    return config


def leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted path, value) of every leaf, in the order in which they were written."""
    for key in config:
        value = config[key]
        if isinstance(value, ConfigDict) and len(value):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(ours: ConfigDict, theirs: ConfigDict) -> list[tuple[str, Any, Any]]:
    """What differs between two configs, as (path, ours, theirs); ``None`` where one has no such leaf.

    Specs inside tuples are compared field by field too: ``parts[0].width``.
    """
    left, right = dict(_inner_leaves(ours)), dict(_inner_leaves(theirs))
    paths = [*left, *(path for path in right if path not in left)]
    return [(path, left.get(path), right.get(path)) for path in paths if left.get(path) != right.get(path)]


def _inner_leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, ConfigDict) and len(value):
        for key in value:
            yield from _inner_leaves(value[key], f"{path}.{key}" if path else key)
    elif isinstance(value, tuple) and any(isinstance(item, (ConfigDict, tuple)) for item in value):
        for index, item in enumerate(value):
            yield from _inner_leaves(item, f"{path}[{index}]")
    else:
        yield path, value


def to_json(config: ConfigDict) -> str:
    """The config as JSON text; :func:`from_json` restores an equal config."""
    return json.dumps(_plain(config), indent=2, ensure_ascii=False)


def from_json(text: str) -> Config:
    """The config that :func:`to_json` wrote.  JSON's arrays become tuples, as all sequences in configs are.

    Raises:
      ValueError: the text is no JSON object.
    """
    fields = json.loads(text)
    if not isinstance(fields, dict):
        raise ValueError(f"{type(fields).__name__} instead of an object")
    return Config(fields)


def complete(config: ConfigDict) -> Config:
    """The config with every spec in it as :func:`spec` would describe it today.

    A field that a spec lacks gets the present default of its class.  So a config that was stored before a
    field existed still equals the one that describes the same thing now.

    Raises:
      UserError: a spec names a class that cannot be imported, or a field that its class does not take.
    """
    return _completed(config, "config")


def suggest(name: str, known: Any) -> str:
    """``"; did you mean 'width'? Known: ..."`` for an error message about an unknown name."""
    names = [str(item) for item in known if not str(item).startswith("_")]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    listing = ", ".join(names[:24]) + (", ..." if len(names) > 24 else "")
    return (f"; did you mean {near[0]!r}?" if near else "") + (f" (known: {listing})" if names else "")


def _descend(config: ConfigDict, dotted: str) -> tuple[ConfigDict, str]:
    node: Any = config
    *parents, last = dotted.split(".")
    for depth, key in enumerate([*parents, last]):
        if not isinstance(node, ConfigDict):
            raise UserError(
                f"config.{'.'.join(dotted.split('.')[:depth])} is a value and has no field {key!r}."
            )
        if key not in node or key == TYPE:
            here = "config" + "".join(f".{part}" for part in dotted.split(".")[:depth])
            raise UserError(f"{here} has no field {key!r}{suggest(key, [k for k in node if k != TYPE])}.")
        if depth < len(parents):
            node = node[key]
    return node, last


def _parse(text: str, current: Any, hint: Any, where: str) -> Any:
    """Reads ``text`` as a value of the type that ``hint``, or else ``current``, has."""
    if hint is Any and current is not None:
        hint = type(current)
    if text == "None" and hint is not Any and _fits(None, hint):
        return None
    for candidate in (text, _literal(text)):
        if isinstance(candidate, int) and not isinstance(candidate, bool) and not _fits(candidate, hint):
            candidate = float(candidate)
        if (
            isinstance(candidate, str)
            and candidate.lower() in ("true", "false")
            and not _fits(candidate, hint)
        ):
            candidate = candidate.lower() == "true"
        if _fits(candidate, hint):
            return tuple(candidate) if isinstance(candidate, list) else candidate
    raise UserError(f"{where}={text!r} has the wrong type: {_name(hint)} is expected, such as {current!r}.")


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _checked(value: Any, hint: Any, where: str) -> Any:
    value = tuple(value) if isinstance(value, list) else value
    if not _fits(value, hint):
        raise UserError(f"{where} is {value!r}, but {_name(hint)} is expected.")
    return value


def _fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` may stand where ``hint`` is asked for; specs fit wherever an object is asked for."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, (str, typing.TypeVar)):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in inner)
    if origin is typing.Literal:
        return value in inner
    if origin is typing.Annotated:
        return _fits(value, inner[0])
    if hint in (None, type(None)):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    concrete = origin or hint
    if isinstance(concrete, type) and issubclass(concrete, Mapping):
        return isinstance(value, (Mapping, ConfigDict))
    if isinstance(concrete, type) and issubclass(concrete, Sequence):
        if not isinstance(value, (tuple, list)):
            return False
        if concrete is tuple and inner and inner[-1] is not Ellipsis:
            return len(value) == len(inner) and all(map(_fits, value, inner))
        return not inner or all(_fits(item, inner[0]) for item in value)
    if value is None or isinstance(value, (bool, int, float, str, tuple, list)):
        return concrete is object
    return True


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    if isinstance(value, (dict, ConfigDict)):
        return all(_is_plain(value[key]) for key in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _plain(value: Any) -> Any:
    if isinstance(value, ConfigDict):
        return {key: _plain(value[key]) for key in value}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def _completed(value: Any, where: str) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_completed(item, f"{where}[{index}]") for index, item in enumerate(value))
    if not isinstance(value, ConfigDict):
        return value
    fields = {key: _completed(value[key], f"{where}.{key}") for key in value}
    if TYPE not in fields:
        return Config(fields)
    try:
        parameters = _parameters(resolve(fields[TYPE]))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    for name in fields:
        if name != TYPE and name not in parameters:
            raise UserError(
                f"{where}: {_short(fields[TYPE])} has no field {name!r}{suggest(name, parameters)}."
            )
    defaults = {
        name: item.default
        for name, item in parameters.items()
        if item.default is not item.empty and _is_plain(item.default)
    }
    return Config(
        {name: (defaults | fields)[name] for name in (TYPE, *parameters) if name in defaults | fields}
    )


def _parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    skipped = {"parent", "name"} if hasattr(target, "clone") and hasattr(target, "apply") else set()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(target).parameters
    return {name: item for name, item in parameters.items() if name not in skipped and item.kind not in kinds}


def _type_hints(target: Callable[..., Any]) -> dict[str, Any]:
    function = vars(target)["__init__"] if isinstance(target, type) and "__init__" in vars(target) else target
    try:
        hints = typing.get_type_hints(function)
        return hints if function is target else {**typing.get_type_hints(target), **hints}
    except NameError:  # a class of a third party whose annotations name what only a type checker imports
        return {}


def _import_path(target: Callable[..., Any]) -> str:
    module, name = getattr(target, "__module__", None), getattr(target, "__qualname__", None)
    if not module or not name or "<" in name or module == "__main__":
        raise UserError(
            f"{target!r} cannot be named in a config: move it to the top level of an importable module."
        )
    if not module.startswith("_experiment_") and resolve(f"{module}:{name}") is not target:
        raise UserError(f"{module}:{name} imports something else than {target!r}.")
    return f"{module}:{name}"


def _short(path: str) -> str:
    return path.rpartition(":")[2]
