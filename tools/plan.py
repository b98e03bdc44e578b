"""Plans several settings of an experiment for a TPU slice that is not there, side by side, or searches among them.

    python tools/plan.py --config=experiments/contrastive/siglip.py:paper --topology=v5e:16x16 \\
        --compare "mesh.fsdp=256" "mesh.fsdp=64,mesh.tensor=4" "accumulate=4"
    python tools/plan.py --config=experiments/contrastive/siglip.py:paper --topology=v5e:16x16 --search \\
        --meshes "fsdp=256" "fsdp=64,tensor=4" --remat=none,projections,full --batch=16384,32768
    python tools/plan.py --config=experiments/contrastive/clip.py:paper --weak v5p:2x2x4 v5p:4x4x4 v5p:4x8x8 \\
        --batch=128 --plot=weak.svg

Each word after ``--compare`` is one setting: changes of the config with commas between them, on top of those of
``--set``; an empty word is the experiment as it is.  ``--search`` tries every combination of meshes, kinds of
rematerialisation (of all towers that have them) and batch sizes, and ranks what fits by examples per second; what does
not fit is named last.  ``--weak`` plans the same work per chip, ``--batch`` examples, on slices of several sizes:
bytes and compute per chip should stay; ``--plot`` draws both.  ``--json`` keeps all plans.  One setting is
one compilation, which may take minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from vlpjax.errors import UserError, tells_mistakes
from vlpjax.planning import topology
from vlpjax.planning.drawing import draw_weak_scaling
from vlpjax.planning.report import as_json, comparison


@tells_mistakes
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", required=True, help="FILE[:ARGUMENT], as for vlpjax.main")
    parser.add_argument("--topology", help=f"a TPU slice: {topology.FORMS}")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="for all settings")
    parser.add_argument("--compare", nargs="+", metavar="PATH=VALUE,...", help="settings, one a word")
    parser.add_argument("--search", action="store_true", help="try meshes x rematerialisation x batch sizes")
    parser.add_argument(
        "--weak", nargs="+", default=[], metavar="TOPOLOGY", help="the same work per chip on each"
    )
    parser.add_argument("--plot", type=Path, help="of --weak: file for a drawing, .svg or .png")
    parser.add_argument(
        "--meshes",
        nargs="+",
        default=[],
        metavar="AXIS=SIZE,...",
        help="to search (default: all useful ones)",
    )
    parser.add_argument("--remat", default="", help="to search, with commas between (default: as configured)")
    parser.add_argument("--batch", default="", help="to search, with commas between; of --weak: per chip")
    parser.add_argument("--json", type=Path, help="file for all plans")
    given = parser.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    _check(given)
    topology.prepare()
    from vlpjax import plans

    base = [("plan.topology", given.topology)] if given.topology else []
    base += map(plans.change, given.set)
    sizes = [int(size) for size in _words(given.batch)]
    if given.weak:
        settings = plans.same_work(given.weak, sizes[0])
    elif given.search:
        settings = plans.candidates(given.config, base, given.meshes, _words(given.remat), sizes)
    else:
        settings = [plans.Setting.of(word) for word in given.compare]
    found = plans.plan_all(given.config, base, settings, report=lambda line: print(line, flush=True))
    print("\n" + comparison(found.ranked() if given.search else found.plans))
    for name, reason in found.refused:
        print(f"{name}: {reason}")
    if given.plot:
        draw_weak_scaling(found.plans, given.plot)
    if given.json:
        figures = {name: as_json(one) for name, one in found.plans}
        given.json.write_text(
            json.dumps({"plans": figures, "refused": dict(found.refused)}, indent=2), encoding="utf-8"
        )
    return 0


def _check(given: argparse.Namespace) -> None:
    """Raises ``UserError`` for options that do not go together, before anything takes time."""
    if [given.search, bool(given.compare), bool(given.weak)].count(True) != 1:
        raise UserError("Give one of --compare with settings, --search, and --weak with topologies.")
    if bool(given.weak) == bool(given.topology):
        raise UserError("Give --topology, or --weak with several of them.")
    if given.plot and not given.weak:
        raise UserError("--plot draws what --weak plans.")
    for name in ("meshes", "remat", "batch"):
        if getattr(given, name) and not (given.search or (given.weak and name == "batch")):
            raise UserError(f"--{name} belongs to --search; a setting of --compare says all that it changes.")
    if given.weak and len(_words(given.batch)) != 1:
        raise UserError("--weak needs --batch: one number, the examples per chip.")
    for size in _words(given.batch):
        if not size.isdecimal() or not int(size):
            raise UserError(f"--batch names {size!r}; a batch is a whole number of examples.")
    for name, file in (("json", given.json), ("plot", given.plot)):
        if file and not file.absolute().parent.is_dir():
            raise UserError(f"--{name}={file} cannot be written: there is no folder {file.parent}.")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


if __name__ == "__main__":
    sys.exit(main())
