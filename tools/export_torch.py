"""Writes a run as a folder that PyTorch's libraries load.

``python tools/export_torch.py --workdir=RUN --out=FOLDER`` takes the newest checkpoint of a run and writes weights,
``config.json``, preprocessing and tokenizer.  ``--tower=image`` writes one tower of several, ``--params=NAME`` a
teacher's parameters, ``--family=NAME`` the form of a certain family, ``--dtype=bfloat16`` half the bytes.
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
    parser.add_argument("--out", required=True, help="folder to be made")
    parser.add_argument(
        "--tower", default="", help="one tower of the run (default: all of them as one model)"
    )
    parser.add_argument("--params", default="student", help="'student' (default), or the name of a teacher")
    parser.add_argument(
        "--family", default="", help="form to write (default: the first that holds the model)"
    )
    parser.add_argument("--dtype", default="float32", help="float32 (default), bfloat16 or float16")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that is there")
    given = parser.parse_args(arguments)
    from vlpjax.exchange import export_run

    written = export_run(**vars(given))
    print(f"{given.out}: {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
