"""Several plans of one experiment: settings side by side, and a search for those that fit and are fast."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from vlpjax import config as configs
from vlpjax.errors import UserError
from vlpjax.mesh import AXES
from vlpjax.plan import TooLarge, load_for_topology, plan
from vlpjax.planning import topology
from vlpjax.planning.report import Plan

Changes = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Setting:
    """Changes of a config, under the name that a table shows."""

    name: str
    changes: Changes

    @classmethod
    def of(cls, text: str) -> Setting:
        """From ``"mesh.fsdp=32,mesh.tensor=4"``; an empty text changes nothing.

        Commas inside brackets belong to a value.

        Raises:
          UserError: a change without a value.
        """
        return cls(text, tuple(map(change, split_changes(text))))


@dataclass
class Plans:
    """What became of several settings.

    Attributes:
      plans: (name, plan), in the order in which they were asked for.
      refused: (name, reason) of those that fit no chip, or make no sense.
    """

    plans: list[tuple[str, Plan]] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)

    def ranked(self) -> list[tuple[str, Plan]]:
        """Those that fit first, and of them the fastest per example first."""
        return sorted(self.plans, key=lambda item: (not item[1].fits, -item[1].examples_per_second))


def change(text: str) -> tuple[str, str]:
    """``("mesh.fsdp", "32")`` from ``"mesh.fsdp=32"``.

    Raises:
      UserError: there is no value.
    """
    path, equals, value = text.strip().partition("=")
    if not equals or not path:
        raise UserError(f"The setting {text!r} has no value; write PATH=VALUE, such as mesh.fsdp=32.")
    return path.removeprefix("config."), value


def split_changes(text: str) -> Iterator[str]:
    """The parts between commas that stand in no bracket or quotation mark."""
    depth, quoted, part = 0, "", ""
    for letter in text:
        if quoted:
            quoted = "" if letter == quoted else quoted
        elif letter in "\"'":
            quoted = letter
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0 and not quoted:
            yield part
            part = ""
        else:
            part += letter
    if part.strip():
        yield part


def candidates(
    experiment: str,
    base: Sequence[tuple[str, str]],
    meshes: Sequence[str],
    remat: Sequence[str],
    batch: Sequence[int],
) -> list[Setting]:
    """All combinations of meshes, kinds of rematerialisation and batch sizes; what is empty stays as configured.

    Args:
      base: changes that all have, among them the topology.
      meshes: such as ``"fsdp=64,tensor=4"``; axes that are not named are 1.  Empty means: all devices on ``fsdp``, and
        the same with 2, 4 and 8 of them on ``tensor``, as far as these divide.
      remat: for every tower that has the field.

    Raises:
      UserError: an unknown axis, or kinds of rematerialisation for towers that have none.
    """
    config = load_for_topology(experiment, base)
    towers = [path for path, _ in configs.leaves(config.towers) if path.rpartition(".")[2] == "remat"]
    if remat and not towers:
        raise UserError("No tower of this experiment sets a field remat; leave --remat out.")
    count = len(topology.devices_of(config.plan.topology))
    if not meshes:
        meshes = [
            f"fsdp={count // parts}" + (f",tensor={parts}" if parts > 1 else "")
            for parts in (1, 2, 4, 8)
            if count % parts == 0
        ]
    found = []
    for mesh, kind, size in itertools.product(meshes, remat or [""], batch or [0]):
        sizes = dict.fromkeys(AXES, "1") | dict(map(change, mesh.split(",")))
        unknown = [axis for axis in sizes if axis not in AXES]
        if unknown:
            raise UserError(f"--meshes names the axis {unknown[0]!r}; there are {', '.join(AXES)}.")
        changes = [(f"mesh.{axis}", value) for axis, value in sizes.items()]
        changes += [(f"towers.{path}", kind) for path in towers if kind]
        changes += [("data.train.batch_size", str(size))] if size else []
        parts = [mesh, f"remat={kind}" if kind else "", f"batch={size:,}" if size else ""]
        found.append(Setting(" ".join(filter(None, parts)), tuple(changes)))
    return found


def same_work(topologies: Sequence[str], batch: int) -> list[Setting]:
    """The same number of examples per chip on several slices.

    Raises:
      UserError: no such topology.
    """
    return [
        Setting(
            name,
            (("plan.topology", name), ("data.train.batch_size", str(batch * topology.chips_of(name)))),
        )
        for name in topologies
    ]


def plan_all(
    experiment: str,
    base: Sequence[tuple[str, str]],
    settings: Sequence[Setting],
    report: Callable[[str], None] = lambda line: None,
) -> Plans:
    """Plans every setting; one that does not fit or makes no sense does not stop the others.

    Args:
      report: is told when a setting begins.

    Raises:
      UserError: none of the settings makes sense; what is wrong with the first of them.
    """
    found = Plans()
    senseless: list[UserError] = []
    for number, setting in enumerate(settings, start=1):
        report(f"{number} of {len(settings)}: {setting.name or 'as configured'}")
        try:
            one = plan(load_for_topology(experiment, [*base, *setting.changes]))
        except UserError as error:
            found.refused.append((setting.name or "as configured", str(error)))
            senseless += [] if isinstance(error, TooLarge) else [error]
        else:
            found.plans.append((setting.name, one))
    if senseless and len(senseless) == len(settings):
        raise senseless[0]
    return found
