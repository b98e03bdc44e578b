"""A real sentence encoder, all-MiniLM-L6-v2, in our BERT tower: the embeddings are those of `transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers

from tests.weights import real
from vlpjax.data.sources import TFDS
from vlpjax.data.tokenizers import JsonTokenizer
from vlpjax.data.transforms.texts import Tokenize
from vlpjax.models.text import TextTransformer
from vlpjax.weights import from_pretrained

LENGTH = 64  # tokens; more than any of these sentences has
TEMPLATES = (
    "a drawing of {}",
    "I saw {} and {}.",
    "Is {} larger than {}?",
    "{}",
    "In the evening, {} lay beside {} on the wooden table, and nobody said a word about {}.",
)


@pytest.fixture(scope="module")
def folder() -> Path:
    return real.folder("minilm")


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    """One hundred, with the names of the bundled pictures in them."""
    source = TFDS("bundled:emoji1594/1.0.0", split="noto")
    names = [source[index]["name"] for index in range(0, len(source), len(source) // 160)]
    found = []
    for index in range(100):
        template = TEMPLATES[index % len(TEMPLATES)]
        found.append(template.format(*(names[(index + 7 * place) % len(names)] for place in range(3))))
    return found


@pytest.fixture(scope="module")
def ids(folder: Path, sentences: list[str]) -> np.ndarray:
    tokenizer = JsonTokenizer(str(folder / "tokenizer.json"))
    tokenize = Tokenize(tokenizer, LENGTH, bos=True)
    return np.stack([tokenize.encode(sentence) for sentence in sentences])


def normalized(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def embeddings(folder: Path, ids: np.ndarray) -> np.ndarray:
    model, variables = from_pretrained(folder)
    assert isinstance(model, TextTransformer)
    model = model.clone(pool="mean", pooler=False, scan=False)
    return normalized(jax.jit(lambda variables: model.apply(variables, ids)["embedding"])(variables))


def test_its_tokenizer_is_ours(folder: Path, sentences: list[str], ids: np.ndarray) -> None:
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    for sentence, row in zip(sentences, ids, strict=True):
        assert theirs.encode(sentence, truncation=False, padding=False) == [i for i in row.tolist() if i]


def test_embeddings_of_100_sentences_equal_theirs(
    folder: Path, ids: np.ndarray, embeddings: np.ndarray
) -> None:
    peer = transformers.BertModel.from_pretrained(folder).eval()
    mask = torch.tensor(ids != 0)
    with torch.no_grad():
        states = peer(torch.tensor(ids).long(), attention_mask=mask.long()).last_hidden_state
        mean = (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    difference = np.abs(embeddings - normalized(mean)).max()
    assert difference < 2e-6, difference


def test_what_it_knows_arrived(folder: Path, embeddings: np.ndarray) -> None:
    """Weights that are merely permuted would give finite embeddings too; these tell meanings apart."""
    model, variables = from_pretrained(folder)
    model = model.clone(pool="mean", pooler=False)
    tokenize = Tokenize(JsonTokenizer(str(folder / "tokenizer.json")), 16, bos=True)
    texts = ("a small dog is sleeping", "the puppy takes a nap", "interest rates rose again")
    rows = np.stack([tokenize.encode(text) for text in texts])
    found = normalized(jax.jit(lambda variables: model.apply(variables, rows)["embedding"])(variables))
    similarity = found @ found.T
    assert similarity[0, 1] > 0.6 > 0.2 > similarity[0, 2]
