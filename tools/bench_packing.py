"""Packing: how full rows are, and how fast conversations and their tokens come, beside one conversation per row.

    python tools/bench_packing.py                     # rows of 2,048 and 8,192 tokens
    python tools/bench_packing.py --lengths=4096 --spread=1.2 --open_rows=16 64 256

The conversations: a question and an answer of common words, as many as give log-normal lengths with a median of 300
tokens, cut at the length of a row.  Both pipelines tokenize them when they are read, in one thread.  They take turns,
and time is that of the CPU; what is printed is the median of the turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from vlpjax.data.packed_documents import PackedDocuments, first_fit
from vlpjax.data.pipeline import Pipeline
from vlpjax.data.tokenizers import SentencePieceTokenizer
from vlpjax.data.transforms import ChatTemplate, Conversation

TOKENIZER = SentencePieceTokenizer("bundled:emoji1594.spm.model")
WORDS = ("left", "right", "duck", "red", "house", "flag", "moon", "face")
QUESTION = 0.2  # of a conversation's words


@dataclasses.dataclass(frozen=True)
class Conversations:
    """Conversations of drawn words, made once and kept in memory."""

    count: int
    median: float
    spread: float

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)
        words = [word for word in WORDS if len(TOKENIZER.encode(word)) == 1]
        sizes = np.maximum(2, rng.lognormal(np.log(self.median), self.spread, self.count)).astype(int)
        turns = []
        for size in sizes:
            drawn = [words[place] for place in rng.integers(len(words), size=size)]
            asked = max(1, int(QUESTION * size))
            said = (("user", drawn[:asked]), ("assistant", drawn[asked:]))
            turns.append([dict(role=role, content=" ".join(part)) for role, part in said])
        object.__setattr__(self, "_turns", turns)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"turns": self._turns[index]}  # type: ignore[attr-defined]

    def describe(self, index: int) -> str:
        return f"conversation {index}"

    def fingerprint(self) -> str:
        return f"conversations {self.count} {self.median} {self.spread}"


def conversation(length: int, pad: bool) -> Conversation:
    return Conversation(
        TOKENIZER, length, ChatTemplate(), TOKENIZER.vocab_size, tokens_per_image=1, lower=True, pad=pad
    )


def turn(pipeline: Pipeline, first: int, steps: int) -> tuple[float, float, float]:
    """Conversations per CPU second, real tokens per CPU second, and the share of real tokens."""
    conversations, real, whole = 0, 0, 0
    begin = time.thread_time()
    batches = [pipeline.batch(step) for step in range(first, first + steps)]
    spent = time.thread_time() - begin
    for batch in batches:
        tokens = batch["tokens"]
        if "segment_ids" in batch:
            filled = batch["segment_ids"] > 0
            conversations += int(batch["segment_ids"].max(axis=1).sum())
        else:  # a row ends with what is asked for, or in the middle of it
            last = tokens.shape[1] - np.argmax(batch["weights"][:, ::-1] > 0, axis=1)
            filled = np.arange(tokens.shape[1]) < last[:, None]
            conversations += len(tokens)
        real, whole = real + int(filled.sum()), whole + filled.size
    return conversations / spent, real / spent, real / whole


def compare(source: Conversations, length: int, open_rows: list[int], turns: int, rows: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        kept, begin = Path(folder, "sizes.npy"), time.thread_time()
        packed = PackedDocuments(
            source, {"conversation": conversation(length, pad=False)}, length, sizes=str(kept)
        )
        count, measuring = len(packed), time.thread_time() - begin
        with open(kept, "rb") as file:
            np.load(file)  # whose they are
            sizes = np.load(file)[:, :1]
    lengths = sizes[:, 0]
    print(
        f"rows of {length}: {len(sizes)} conversations, median {np.median(lengths):.0f} and mean {lengths.mean():.0f} "
        f"tokens, the longest {lengths.max()}; measured and packed at {len(sizes) / measuring:.0f} a CPU second"
    )
    for most in open_rows:
        begin = time.thread_time()
        filled = first_fit(sizes, (length + 1,), most)
        spent = time.thread_time() - begin
        share = lengths.sum() / (len(filled) * (length + 1))
        print(
            f"  {most:4} open rows: {100 * share:6.2f} % real tokens in {len(filled)} rows, "
            f"{1e6 * spent / len(sizes):.1f} microseconds a conversation"
        )
    per_row = max(1, len(sizes) // count)
    alone = Pipeline(
        source, {"conversation": conversation(length, pad=True)}, batch_size=rows * per_row, keep=("tokens", "weights")
    )  # fmt: skip
    together = Pipeline(packed, {}, batch_size=rows)
    for pipeline in (alone, together):
        pipeline.batch(0)
    found = [(turn(alone, k, 1), turn(together, k, 1)) for k in range(1, turns + 1)]
    for name, side in (("one to a row", 0), ("packed", 1)):
        speed, tokens, share = (statistics.median(pair[side][what] for pair in found) for what in range(3))
        print(
            f"  {name:12} {speed:7.0f} conversations and {tokens:9.0f} real tokens a CPU second, "
            f"{100 * share:6.2f} % of the batch is real"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192], help="of rows, in tokens")
    parser.add_argument("--count", type=int, default=2000, help="number of conversations")
    parser.add_argument("--median", type=float, default=300, help="of their lengths, in words")
    parser.add_argument("--spread", type=float, default=0.8, help="standard deviation of their logarithms")
    parser.add_argument("--open_rows", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rows", type=int, default=16, help="rows of a packed batch")
    options = parser.parse_args()
    source = Conversations(options.count, options.median, options.spread)
    for length in options.lengths:
        compare(source, length, options.open_rows, options.turns, options.rows)


if __name__ == "__main__":
    main()
