"""What kind of word each word of an English caption is, by rules: enough to swap two of a kind or to shuffle some.

No tagger is loaded and nothing is learned.  Words that English has few of (articles, prepositions, auxiliaries) are
listed, adjectives and adverbs are known by a list and by their endings, verbs by ``-ing`` and by a list, and all other
words are nouns.  On captions, which describe things, that is right for most words; where it is wrong the caption is
changed in an odd place, which makes a negative no less wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

NOUN, ADJECTIVE, ADVERB, VERB, OTHER = "noun", "adjective", "adverb", "verb", "other"


def word_set(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


_OTHER = word_set("""
    very too so quite also just only rather more most less least much many few several other own same
    a an the this that these those some any each every no all both either neither another such of in on
    at by to from with without for about above across after against along among around as before behind
    below beneath beside between beyond down during except inside into like near off onto out outside
    over past through toward towards under until up upon via within and or but nor so yet if while than
    then because i you he she it we they me him her us them my your his its our their mine yours hers
    ours theirs who whom whose which what where when why how there here not is are was were be been
    being am do does did has have had can could will would shall should may might must one two three
    four five six seven eight nine ten left right
""")
_ADJECTIVES = word_set("""
    red green blue yellow orange purple pink brown black white grey gray golden silver dark light bright
    big small large little tiny huge tall short long wide narrow thick thin high low old young new
    modern ancient fresh hot cold warm cool wet dry clean dirty full empty open closed round square flat
    sharp soft hard smooth rough heavy happy sad angry calm quiet loud fast slow good bad nice pretty
    cute ugly rich poor strong weak wooden metal glass plastic striped colorful colourful busy crowded
    lone single double wild tame sunny cloudy rainy snowy
""")
_ADJECTIVE_ENDINGS = ("ful", "ous", "ive", "less", "able", "ible", "ish", "ic")
_VERBS = word_set("""
    sits stands runs walks eats plays looks holds rides lies jumps flies swims sleeps wears carries
    shows uses makes sit stand run walk eat play look hold ride lie jump fly swim sleep wear carry cross
    crosses watches
""")
_NOUNS = word_set("""
    ring king thing wing string spring morning evening building ceiling clothing painting drawing family
    fish dish olive music fabric table vegetable traffic garlic magic picnic public reply jelly belly
    lily butterfly
""")
_WORD = re.compile(r"[^\W\d_][\w'’-]*")


def kind_of(word: str) -> str:
    """The kind of a word: a noun, adjective, adverb, verb, or other (articles, prepositions, numbers, punctuation)."""
    plain = word.strip(".,;:!?\"'()[]").lower()
    if not _WORD.fullmatch(plain) or plain in _OTHER:
        return OTHER
    if plain in _NOUNS:
        return NOUN
    if plain in _ADJECTIVES or (len(plain) > 4 and plain.endswith(_ADJECTIVE_ENDINGS)):
        return ADJECTIVE
    if len(plain) > 4 and plain.endswith("ly"):
        return ADVERB
    if plain in _VERBS or (len(plain) > 4 and plain.endswith("ing")):
        return VERB
    return NOUN


def kinds_of(words: Sequence[str]) -> list[str]:
    """The kind of every word."""
    return [kind_of(word) for word in words]


def noun_phrases(kinds: Sequence[str]) -> list[tuple[int, int]]:
    """(start, end) of every run of adjectives and nouns that ends in a noun."""
    phrases = []
    place = 0
    while place < len(kinds):
        start = place
        while place < len(kinds) and kinds[place] == ADJECTIVE:
            place += 1
        nouns = place
        while place < len(kinds) and kinds[place] == NOUN:
            place += 1
        if place > nouns:
            phrases.append((start, place))
        elif place == start:
            place += 1
    return phrases


def elements(words: Sequence[str]) -> dict[str, list[tuple[int, int]]]:
    """(start, end) of what can be swapped: nouns, noun phrases, adjectives, adverbs and verbs."""
    kinds = kinds_of(words)
    found = {
        kind: [(place, place + 1) for place, its in enumerate(kinds) if its == kind]
        for kind in (NOUN, ADJECTIVE, ADVERB, VERB)
    }
    return {**found, "noun phrase": noun_phrases(kinds)}


def swaps(words: Sequence[str]) -> list[list[str]]:
    """All captions that differ from this one by two elements of one kind that changed places."""
    before, found = list(words), []
    for spans in elements(words).values():
        for first, (start, end) in enumerate(spans):
            for other_start, other_end in spans[first + 1 :]:
                swapped = [
                    *before[:start], *before[other_start:other_end], *before[end:other_start], *before[start:end],
                    *before[other_end:],
                ]  # fmt: skip
                if [word.lower() for word in swapped] != [word.lower() for word in before]:
                    found.append(swapped)
    return [caption for place, caption in enumerate(found) if caption not in found[:place]]
