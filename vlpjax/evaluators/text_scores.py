"""Scores of texts against references, on the host: answers to questions, captions, and yes or no."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Texts = Sequence[str]
References = Sequence[Sequence[str]]  # of every answer one or more

ORDERS = (1, 2, 3, 4)  # lengths of the runs of words that BLEU-4 and CIDEr count

# --- of single answers ---------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Lower-cased words without punctuation; an apostrophe inside of a word is a part of it."""
    return re.findall(r"\w+(?:['’]\w+)*", text.lower())


def exact(answer: str, references: Sequence[str]) -> float:
    """Whether the words are those of a reference, in its order."""
    return float(any(words(answer) == words(reference) for reference in references))


def keywords(answer: str, references: Sequence[str]) -> float:
    """The share of a reference's different words that are said, wherever; of the reference where it is largest."""
    said = set(words(answer))
    asked = [set(words(reference)) for reference in references]
    return max((len(said & those) / len(those) for those in asked if those), default=0.0)


_CHOICE = re.compile(r"\W*([a-z])(?:$|[.):,])", re.IGNORECASE)  # "B", "(b)", "B. a duck"; not "A duck"


def letter(answer: str, references: Sequence[str]) -> float:
    """Whether the option that is chosen by its letter is a reference's; an answer without a letter chooses none."""
    chosen = _CHOICE.match(answer.strip())
    right = [_CHOICE.match(reference.strip()) for reference in references]
    return float(chosen is not None and chosen[1].lower() in [one[1].lower() for one in right if one])


# --- VQA -----------------------------------------------------------------------------------------------------------

ARTICLES = ("a", "an", "the")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {word: str(number) for number, word in enumerate(NUMBERS)} | {"none": "0"}
_VERBS = (
    "ai", "are", "ca", "could", "did", "do", "does", "had", "has", "have", "is", "might", "must", "need", "should",
    "was", "were", "wo", "would",
)  # fmt: skip
# Written without their apostrophe, these are no other word.
CONTRACTIONS = {f"{verb}nt": f"{verb}n't" for verb in _VERBS}
CONTRACTIONS |= {
    f"{before}{after}": f"{before}'{after}"
    for before, endings in {
        "i": ("m", "ve"), "you": ("d", "ll", "re", "ve"), "he": ("s",), "she": ("s",), "that": ("s",), "there": ("s",),
        "they": ("d", "ll", "re", "ve"), "we": ("ve",), "what": ("s", "ll", "re", "ve"), "where": ("s", "d"),
        "who": ("s", "d", "ll"), "how": ("s", "d"), "could": ("ve",), "might": ("ve",), "should": ("ve",),
        "would": ("ve",),
    }.items()
    for after in endings
}  # fmt: skip
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),(?=\d)")
_FULL_STOP = re.compile(r"\.(?!\d)")


def normalize_vqa(text: str) -> str:
    """An answer as VQA compares it: without case, punctuation, articles and full stops, numbers in digits.

    Punctuation that touches a blank, or any in a text with a comma inside of a number, is left out; other punctuation
    becomes a blank.

    Source: "VQA: Visual Question Answering", arXiv 1505.00468, and the evaluation that its authors describe on
    visualqa.org.
    """
    text = " ".join(text.split())
    number = _COMMA_IN_NUMBER.search(text) is not None
    found = text
    for mark in _PUNCTUATION:
        apart = f"{mark} " in text or f" {mark}" in text or number
        found = found.replace(mark, "" if apart else " ")
    said = [DIGITS.get(word, word) for word in _FULL_STOP.sub("", found).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in said if word not in ARTICLES)


def vqa(answer: str, references: Sequence[str]) -> float:
    """min(matches / 3, 1), which ten people's answers are meant for: right is what three of them say.

    Source: "VQA: Visual Question Answering", arXiv 1505.00468, section 3.
    """
    said = normalize_vqa(answer)
    return min(sum(said == normalize_vqa(reference) for reference in references) / 3, 1.0)


def vqa_left_out(answer: str, references: Sequence[str]) -> float:
    """The mean of :func:`vqa` over all sets of references but one, which leader boards report.

    Of ten references, 1, 2, 3 and 4 matches give 0.3, 0.6, 0.9 and 1.  A single one is not left out.
    """
    if len(references) < 2:
        return vqa(answer, references)
    said = normalize_vqa(answer)
    same = [said == normalize_vqa(reference) for reference in references]
    return float(np.mean([min((sum(same) - one) / 3, 1.0) for one in same]))


# --- captions ------------------------------------------------------------------------------------------------------


def runs(tokens: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    """How often each run of ``order`` words occurs."""
    return Counter(tuple(tokens[at : at + order]) for at in range(len(tokens) - order + 1))


def bleu(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """BLEU-4 of all candidates together, tokens each; not smoothed, so that it is 0 where no run of four is right.

    exp(min(0, 1 - r / c) + mean over n = 1..4 of log p_n), where p_n is the share of the candidates' runs of n words
    that a reference has as often, c the candidates' length, and r the length of the references that are nearest to
    theirs, of two the shorter.

    Source: "BLEU: a Method for Automatic Evaluation of Machine Translation", section 2.3.
    """
    said = sum(map(len, candidates))
    asked = sum(
        min((abs(len(one) - len(candidate)), len(one)) for one in those)[1]
        for candidate, those in zip(candidates, references, strict=True)
    )
    logs = []
    for order in ORDERS:
        right = total = 0
        for candidate, those in zip(candidates, references, strict=True):
            found, most = runs(candidate, order), Counter[tuple[str, ...]]()
            for one in those:
                most |= runs(one, order)
            right += (found & most).total()
            total += found.total()
        if not right:
            return 0.0
        logs.append(math.log(right / total))
    return math.exp(min(0.0, 1 - asked / said) + sum(logs) / len(logs))


def rouge_l(candidate: Sequence[str], references: Sequence[Sequence[str]], beta: float = 1.2) -> float:
    """F-score of the longest common subsequence, with the references' best precision and best recall.

    Args:
      beta: how much more recall counts than precision; captions of COCO are judged with 1.2.

    Source: "ROUGE: A Package for Automatic Evaluation of Summaries", section 3.
    """
    common = [(_longest_common(candidate, one), len(one)) for one in references]
    precision = max(length / max(len(candidate), 1) for length, _ in common)
    recall = max(length / max(size, 1) for length, size in common)
    if not precision:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def _longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in one:
        before = row
        row = [0]
        for at, again in enumerate(other, 1):
            row.append(before[at - 1] + 1 if word == again else max(before[at], row[-1]))
    return row[-1]


def cider(
    candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]], sigma: float = 6.0
) -> np.ndarray:
    """CIDEr-D of every candidate, tokens each, [N]; 10 at most, and leader boards report a hundred times the mean.

    With g(w) = count(w) * log(N / max(1, rows with w in a reference)) for every run w of n words,

        10 * mean over n = 1..4 and references r of
            sum_w min(g_c(w), g_r(w)) g_r(w) / (|g_c| |g_r|) * exp(-(len c - len r) ** 2 / (2 sigma ** 2))

    Source: "CIDEr: Consensus-based Image Description Evaluation", arXiv 1411.5726, equation 8, with the mean over n.
    """
    counted = {order: [[runs(one, order) for one in those] for those in references] for order in ORDERS}
    found = np.zeros(len(candidates))
    for order, rows in counted.items():
        having = Counter(run for those in rows for run in set().union(*those))

        def weighed(
            counts: Counter[tuple[str, ...]], having: Counter[tuple[str, ...]] = having
        ) -> dict[tuple[str, ...], float]:
            return {run: n * math.log(len(candidates) / max(1, having[run])) for run, n in counts.items()}

        for row, (candidate, those) in enumerate(zip(candidates, rows, strict=True)):
            said, scores = weighed(runs(candidate, order)), []
            for one, tokens in zip(those, references[row], strict=True):
                asked = weighed(one)
                product = sum(
                    min(value, asked[run]) * asked[run] for run, value in said.items() if run in asked
                )
                length = math.hypot(*said.values()) * math.hypot(*asked.values())
                near = math.exp(-((len(candidate) - len(tokens)) ** 2) / (2 * sigma**2))
                scores.append(near * product / length if length else 0.0)
            found[row] += 10 * float(np.mean(scores)) / len(ORDERS)
    return found


# --- yes or no -----------------------------------------------------------------------------------------------------


def says_yes(text: str) -> bool:
    """Whether the first sentence denies nothing: it has neither "no" nor "not" among its words."""
    said = words(text.partition(".")[0])
    return not any(word in ("no", "not") or word.endswith("n't") for word in said)


def yes_or_no(answers: Texts, references: Texts) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of "yes", and how often it is said; what is not defined is 0.

    Source: "Evaluating Object Hallucination in Large Vision-Language Models" (POPE), arXiv 2305.10355, section 5.
    """
    said, asked = (np.array([says_yes(text) for text in texts]) for texts in (answers, references))
    right = float(np.sum(said & asked))
    precision, recall = right / max(float(said.sum()), 1.0), right / max(float(asked.sum()), 1.0)
    return {
        "yes_no_accuracy": float(np.mean(said == asked)),
        "yes_precision": precision,
        "yes_recall": recall,
        "yes_f1": 2 * precision * recall / (precision + recall) if right else 0.0,
        "yes_share": float(np.mean(said)),
    }


# --- by name -------------------------------------------------------------------------------------------------------


def _captions(answers: Texts, references: References) -> dict[str, float]:
    said = [words(answer) for answer in answers]
    asked = [[words(one) for one in those] for those in references]
    return {
        "bleu4": bleu(said, asked),
        "rouge_l": float(np.mean([rouge_l(*pair) for pair in zip(said, asked, strict=True)])),
        "cider": float(np.mean(cider(said, asked))),
    }


# Scores of one answer by itself; a kind's names are those of what it reports.
SINGLE: Mapping[str, Mapping[str, Callable[[str, Sequence[str]], float]]] = {
    "exact": {"exact_match_accuracy": exact},
    "keywords": {"keyword_accuracy": keywords},
    "letter": {"letter_accuracy": letter},
    "vqa": {"vqa_accuracy": vqa, "vqa_accuracy_left_out": vqa_left_out},
}
# Scores of all answers together.
JOINT: Mapping[str, Callable[[Texts, References], dict[str, float]]] = {
    "captions": _captions,
    "yes_no": lambda answers, references: yes_or_no(answers, [those[0] for those in references]),
}
KINDS = (*SINGLE, *JOINT)


def score(kinds: Sequence[str], answers: Texts, references: References) -> dict[str, float]:
    """All scores of these kinds (:data:`KINDS`), by their names."""
    found: dict[str, float] = {}
    for kind in kinds:
        for name, single in SINGLE.get(kind, {}).items():
            found[name] = float(np.mean([single(*pair) for pair in zip(answers, references, strict=True)]))
        if kind in JOINT:
            found |= JOINT[kind](answers, references)
    return found


def blind(kinds: Sequence[str], references: References, shifts: int = 32) -> dict[str, float]:
    """What it scores to answer with the first reference of any row, drawn evenly: guesses of one who does not see.

    It is the expectation over all rows where there are no more than ``shifts`` + 1; otherwise other rows than an
    answer's own are those at so many distances from it.  Scores of all answers together are left out.
    """
    count = len(references)
    distances: list[int] = []
    if count > 1:
        distances = np.unique(np.linspace(1, count - 1, min(shifts, count - 1)).astype(int)).tolist()
    kinds = [kind for kind in kinds if kind in SINGLE]
    guesses = [those[0] for those in references]
    own = score(kinds, guesses, references)
    others = [score(kinds, [*guesses[far:], *guesses[:far]], references) for far in distances]
    return {
        name: value / count + (1 - 1 / count) * float(np.mean([one[name] for one in others]))
        if others
        else value
        for name, value in own.items()
    }
