"""Makes a checkpoint of a folder of PyTorch's weights, for runs to start from or to be taught by.

``python tools/import_torch.py --model=FOLDER --out=CHECKPOINT`` writes a work directory that ``config.start.run`` and
a teacher's ``checkpoint`` can name.  Its ``config.json`` holds the towers as an experiment would describe them; its
``tokenizer`` and ``preprocessor_config.json`` are those of the folder.
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
    parser.add_argument("--model", required=True, help="folder (or file) of pretrained weights")
    parser.add_argument("--out", required=True, help="work directory to be made")
    parser.add_argument("--tower", default="", help="name of the tower, for weights of a single one")
    parser.add_argument(
        "--family", default="", help="family of the weights (default: what their config says)"
    )
    parser.add_argument("--mesh", default="", help="devices to spread the weights over while reading: fsdp=8")
    parser.add_argument("--overwrite", action="store_true", help="replace a work directory that is there")
    given = parser.parse_args(arguments)
    from vlpjax.exchange import import_folder

    written = import_folder(**vars(given))
    print(f"{given.out}: {', '.join(written.towers)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
