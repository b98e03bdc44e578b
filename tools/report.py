"""Writes the report of a run again: ``python tools/report.py WORKDIR`` prints the path of ``report.html``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0] + ".")
    parser.add_argument("workdir", type=Path, help="work directory of the run")
    arguments = parser.parse_args()
    from vlpjax.errors import UserError
    from vlpjax.observe.report import write_report

    try:
        print(write_report(arguments.workdir))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.path.insert(
        0, str(Path(__file__).resolve().parents[1])
    )  # Works from a checkout that is not installed.
    sys.exit(main())
