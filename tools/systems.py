"""Writes the README's table of systems out of the experiment files.

``python tools/systems.py`` rewrites the table; ``--check`` only says whether it is up to date.  An experiment
file describes itself in a module constant ``SYSTEM``: the system's name, its paper, what the file adds, the
published figure and the figure measured here with the command that prints it.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # experiments import vlpjax, which need not be installed
BEGIN, END = "<!-- systems: made by tools/systems.py -->", "<!-- /systems -->"
COLUMNS = ("system", "paper", "here", "published", "measured")


def systems() -> list[dict[str, str]]:
    """The ``SYSTEM`` of every experiment file that has one, in the order of the files' names."""
    rows = []
    for path in sorted((ROOT / "experiments").rglob("*.py")):
        spec = importlib.util.spec_from_file_location(f"_system_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if hasattr(module, "SYSTEM"):
            rows.append({"experiment": str(path.relative_to(ROOT)), **module.SYSTEM})
    return rows


def table(rows: list[dict[str, str]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| experiment | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row in rows:
        lines.append(f"| `{row['experiment']}` | " + " | ".join(row[name] for name in COLUMNS) + " |")
    return "\n".join(lines)


def with_table(readme: str) -> str:
    """The README's text with a fresh table between the markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"README.md lacks the markers {BEGIN} and {END}.")
    return f"{before}{BEGIN}\n{table(systems())}\n{END}{after}"


def main() -> int:
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = with_table(old)
    if "--check" in sys.argv[1:]:
        if new != old:
            print("README.md's table of systems is out of date; run: python tools/systems.py")
        return int(new != old)
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
