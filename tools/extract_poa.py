"""Cuts a small network out of a run of POA, as an ordinary ViT.

``python tools/extract_poa.py --workdir=RUN --width=384 --depth=12 --out=CHECKPOINT`` takes the newest checkpoint of a
run and writes a work directory that ``config.start.run``, a teacher's ``checkpoint`` and ``tools/export_torch.py`` can
name.  Its ``config.json`` holds the ViT as an experiment would describe it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from vlpjax.errors import tells_mistakes


@tells_mistakes
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--workdir", required=True, help="of the run")
    parser.add_argument(
        "--width", required=True, type=int, help="of the small network: a multiple of a head's"
    )
    parser.add_argument("--depth", required=True, type=int, help="blocks of the small network")
    parser.add_argument("--out", required=True, help="work directory to be made")
    parser.add_argument("--tower", default="image", help="name of the elastic tower (default: image)")
    parser.add_argument("--params", default="ema", help="name of a teacher (default: ema), or 'student'")
    parser.add_argument("--overwrite", action="store_true", help="replace a work directory that is there")
    given = parser.parse_args(arguments)
    from vlpjax.exchange import extract_run

    extract_run(**vars(given))
    print(f"{given.out}: {given.tower} of width {given.width} and depth {given.depth}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
