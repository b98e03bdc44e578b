"""Counts the cycles of our attention kernels' loops in the schedules that the TPU compiler writes for them.

    python tools/kernel_cycles.py --topology v5e:2x2 v5p:2x2x1 v6e:2x2 TPU7x:2x2x1

prints, per chip and kernel, the instruction bundles of the turn that computes one tile of logits, without and with
masks: the table of ``vlpjax/planning/kernels.py``.  No TPU is needed; the compiler is asked to write the bundles that
it packs, one a cycle, into a folder that is removed afterwards.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # works from a checkout that is not installed

from vlpjax.errors import UserError, tells_mistakes  # noqa: E402
from vlpjax.planning import topology  # noqa: E402
from vlpjax.planning.report import table  # noqa: E402

PROGRAM = """
import sys
from vlpjax.planning import topology
topology.prepare()
import jax, jax.numpy as jnp
from vlpjax.mesh import make_layout
from vlpjax.parallel import tpu_flash, tpu_short
from vlpjax.parallel.attention import causal

layout = make_layout({}, devices=topology.devices_of(sys.argv[1])[:1])

def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.replicated)

for form, tokens, heads, kv_heads, width in ((tpu_flash, 8192, 4, 1, 128), (tpu_short, 256, 16, 16, 72)):
    query, key = array(2, tokens, heads, width), array(2, tokens, kv_heads, width)
    seen = causal(tokens)
    jax.jit(lambda *x: form.forward(*x, seen, scale=0.1)).lower(query, key, key).compile()
    lse = array(2, heads, tokens, dtype=jnp.float32)
    backward = lambda q, k, v, mixed, lse, g: form.backward(q, k, v, seen, mixed, lse, g, scale=0.1)
    jax.jit(backward).lower(query, key, key, query, lse, query).compile()
"""
_BUNDLE = re.compile(r"\s*(?:0x)?[0-9a-f]+\s+(LB|PF|PB|LH|LE)?\s*: (>*) ")
INSIDE = 2  # loops around a turn: that over the grid, and that over heads


@tells_mistakes
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--topology", nargs="+", default=["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "TPU7x:2x2x1"])
    given = parser.parse_args(arguments)
    rows: list[tuple[str, ...]] = []
    topology.require_compiler()
    for name in given.topology:
        topology.parse(name)
        rows += [(name, *row) for row in kernels_of(name)]
    print(table(("chip", "kernel", "whole tile", "masked tile"), rows))
    return 0


def kernels_of(name: str) -> list[tuple[str, str, str]]:
    """Kernel, cycles of a whole tile and of a masked one, all kernels on a chip.

    Raises:
      UserError: the compiler fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, name],
            env={**os.environ, "LIBTPU_INIT_ARGS": options, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["it says nothing"]
            raise UserError(f"The kernels do not compile for {name}: {last[0]}.")
        found = []
        for file in sorted(Path(folder).glob("*-final_bundles.txt")):
            kernel = re.search(r"-((?:interval_flash|short_attention)_\w+)\.\d+-\d+-final_bundles", file.name)
            if kernel and "schedule" not in file.name:
                turns = sorted(sorted(turns_in(file.read_text(encoding="utf-8")))[-2:])
                whole, masked = turns
                found.append((kernel[1], str(whole), str(masked)))
        return found


def turns_in(text: str) -> Iterator[int]:
    """Bundles of the turns of all inner loops in the compiler's text of a kernel."""
    count = 0
    for line in text.splitlines():
        bundle = _BUNDLE.match(line)
        if not bundle:
            continue
        if count and (bundle[1] == "LB" or len(bundle[2]) < INSIDE):
            yield count
            count = 0
        count += len(bundle[2]) >= INSIDE
    if count:
        yield count


if __name__ == "__main__":
    sys.exit(main())
