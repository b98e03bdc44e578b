"""Scores of texts: against figures that papers print, sums done by hand, and loops that count in another way."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from vlpjax.evaluators.text_scores import (
    bleu,
    blind,
    cider,
    exact,
    keywords,
    letter,
    normalize_vqa,
    rouge_l,
    score,
    vqa,
    vqa_left_out,
    words,
    yes_or_no,
)

# The example of NLTK's documentation of corpus_bleu and sentence_bleu, with the figures that it prints.
GUIDE = "It is a guide to action which ensures that the military always obeys the commands of the party"
GUIDES = (
    "It is a guide to action that ensures that the military will forever heed Party commands",
    "It is the guiding principle which guarantees the military forces always being under the command of the Party",
    "It is the practical guide for the army always to heed the directions of the party",
)
BOOK = "he read the book because he was interested in world history"
BOOKS = ("he was interested in world history because he read the book",)


def test_an_answer_is_compared_word_by_word() -> None:
    assert words("A duck, isn't it?") == ["a", "duck", "isn't", "it"]
    assert exact("Red Apple.", ["pear", "red apple"]) == 1
    assert exact("apple red", ["red apple"]) == 0
    assert keywords("the apple is red", ["green apple", "red"]) == 1
    assert keywords("an apple", ["red apple", "a green round apple"]) == 0.5
    assert keywords("", ["red"]) == keywords("red", [""]) == 0


def test_an_option_is_chosen_by_its_letter() -> None:
    for chosen in ("B", "b.", "(B) a duck", "B: duck", " B, of course"):
        assert letter(chosen, ["B"]) == letter(chosen, ["C", "(b)"]) == 1 and letter(chosen, ["A"]) == 0
    for nothing in ("", "a duck", "both", "duck B"):
        assert letter(nothing, ["A"]) == letter(nothing, ["B"]) == 0


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("Yes.", "yes"),
        ("  a  Dog\nand the cats ", "dog and cats"),
        ("two", "2"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("theyre", "they're"),
        ("3.5 m.", "3.5 m"),
        ("red/blue", "red blue"),
        ("red, blue", "red blue"),
        ("1,000", "1000"),
    ],
)
def test_vqa_reads_answers_without_what_does_not_matter(text: str, normalized: str) -> None:
    assert normalize_vqa(text) == normalized


def test_three_of_ten_people_make_an_answer_right() -> None:
    for matches in range(11):
        people = ["A cat"] * matches + ["dog"] * (10 - matches)
        assert vqa("cat.", people) == min(matches / 3, 1)
        subsets = [np.delete(np.arange(10) < matches, out).sum() for out in range(10)]
        assert vqa_left_out("cat.", people) == pytest.approx(np.mean(np.minimum(np.array(subsets) / 3, 1)))
    assert [round(vqa_left_out("c", ["c"] * m + ["d"] * (10 - m)), 6) for m in range(5)] == [
        0,
        0.3,
        0.6,
        0.9,
        1,
    ]


def test_bleu_is_what_others_print() -> None:
    references = [[one.split() for one in GUIDES], [one.split() for one in BOOKS]]
    assert bleu([GUIDE.split()], references[:1]) == pytest.approx(0.5045666840058485, rel=1e-12)
    assert bleu([GUIDE.split(), BOOK.split()], references) == pytest.approx(0.5920778868801042, rel=1e-12)


def test_bleu_by_hand() -> None:
    assert bleu([list("abcd")], [[list("abcdef")]]) == pytest.approx(math.exp(1 - 6 / 4))
    # 4 of 5 words, 3 of 4 pairs, 2 of 3 triples, 1 of 2 fours; of the references, one is as long.
    assert bleu([list("abcdx")], [[list("abcde"), list("a")]]) == pytest.approx((1 / 5) ** 0.25)
    assert bleu([list("aaaa")], [[list("abcd")]]) == 0  # a word counts as often as a reference has it
    assert bleu([[]], [[list("abcd")]]) == 0


def test_rouge_is_what_its_paper_prints() -> None:
    reference = [["police", "killed", "the", "gunman"]]
    assert rouge_l(["police", "kill", "the", "gunman"], reference) == pytest.approx(3 / 4)
    assert rouge_l(["the", "gunman", "kill", "police"], reference) == pytest.approx(2 / 4)
    assert rouge_l(list("ab"), [list("abcd")], beta=2.0) == pytest.approx(5 * 0.5 / (0.5 + 4))
    # The best precision and the best recall may be different references'.
    assert rouge_l(list("ab"), [list("abcd"), list("a")], beta=1.0) == pytest.approx(2 * 1 * 1 / 2)
    assert rouge_l([], reference) == rouge_l(["x"], reference) == 0


def dense_cider(candidates: list[str], references: list[list[str]]) -> np.ndarray:
    """CIDEr-D with vectors over all runs that occur."""
    found = np.zeros(len(candidates))
    for order in (1, 2, 3, 4):

        def cut(text: str, order: int = order) -> list[str]:
            return [text[at : at + order] for at in range(len(text) - order + 1)]

        names = sorted({run for text in (*candidates, *itertools.chain(*references)) for run in cut(text)})
        rows = np.array(
            [sum(any(name in cut(one) for one in those) for those in references) for name in names]
        )
        rarity = np.log(len(candidates) / np.maximum(rows, 1))
        for row, candidate in enumerate(candidates):
            g = np.array([cut(candidate).count(name) for name in names]) * rarity
            for one in references[row]:
                r = np.array([cut(one).count(name) for name in names]) * rarity
                lengths = np.linalg.norm(g) * np.linalg.norm(r)
                near = np.exp(-((len(candidate) - len(one)) ** 2) / 72)
                part = near * np.minimum(g, r) @ r / lengths if lengths else 0
                found[row] += 10 * part / 4 / len(references[row])
    return found


def test_cider_equals_its_formula_over_dense_vectors() -> None:
    candidates = ["abcde", "abab", "edcbax", "", "bcdd"]
    references = [["abcd", "abcdef"], ["ab", "ababab", "ba"], ["edcb"], ["abc"], ["ddcb", "bcd"]]
    found = cider([list(text) for text in candidates], [[list(one) for one in those] for those in references])
    np.testing.assert_allclose(found, dense_cider(candidates, references), rtol=1e-12)


def test_captions_that_are_their_references_have_ten() -> None:
    texts = [list("abcd"), list("efgh"), list("ijklm")]
    np.testing.assert_allclose(cider(texts, [[text] for text in texts]), 10)
    # By hand: one word of two is right and as rare as the other; no pair is right.
    found = cider([["a", "x"], ["b", "c"]], [[["a", "y"]], [["b", "c"]]])
    assert found[0] == pytest.approx(10 * 0.5 / 4)


def test_yes_is_what_denies_nothing() -> None:
    answers = ["Yes, there is.", "no", "There is not. Yes.", "yes", "There isn't", "Yes"]
    references = ["yes", "yes", "no", "no", "no", "yes"]
    found = yes_or_no(answers, references)
    assert found == pytest.approx(
        dict(yes_no_accuracy=4 / 6, yes_precision=2 / 3, yes_recall=2 / 3, yes_f1=2 / 3, yes_share=3 / 6)
    )
    assert yes_or_no(["no"], ["no"]) == dict(
        yes_no_accuracy=1, yes_precision=0, yes_recall=0, yes_f1=0, yes_share=0
    )


@pytest.mark.parametrize("count", [1, 2, 7])
def test_chance_is_the_mean_over_all_rows_answers(count: int) -> None:
    references = [
        ["red apple", "apple"],
        ["green apple"],
        ["duck"],
        ["duck"],
        ["a red duck"],
        ["cat"],
        ["red"],
    ][:count]
    kinds = ("exact", "keywords", "captions")
    found = blind(kinds, references)
    pairs = [
        score(("exact", "keywords"), [guess[0]], [those]) for guess in references for those in references
    ]
    assert found == pytest.approx({name: np.mean([pair[name] for pair in pairs]) for name in pairs[0]})


def test_only_the_kinds_that_are_asked_for_are_reported() -> None:
    everything = score(("exact", "keywords", "vqa", "captions", "yes_no"), ["yes"], [["yes"]])
    assert list(score(("keywords",), ["yes"], [["yes"]])) == ["keyword_accuracy"]
    assert {"bleu4", "rouge_l", "cider", "vqa_accuracy", "yes_share", "exact_match_accuracy"} < set(
        everything
    )
