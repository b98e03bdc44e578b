"""Generation against `transformers`: greedy for every family, token for token, and beam search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.weights.decoder_peers import CONFIGS, peer, scanned
from tests.weights.parity import randomize
from vlpjax.models.beam import Beam
from vlpjax.models.generate import generate
from vlpjax.models.sampling import MinNewTokens, NoRepeat, RepetitionPenalty
from vlpjax.weights import from_pretrained

IDS = np.random.default_rng(0).integers(0, 61, (2, 9))
NEW = 64
FAMILIES = [name for name in CONFIGS if "," not in name]


def both(name: str, folder: Path) -> tuple[Any, Any, Any]:
    """Their model, and the same imported."""
    theirs: Any = randomize(peer(name))
    theirs.save_pretrained(folder)
    return theirs, *scanned(*from_pretrained(folder))


def continued(theirs: Any, new: int, **options: Any) -> np.ndarray:
    found = theirs.generate(
        torch.from_numpy(IDS), max_new_tokens=new, min_length=0, do_sample=False, pad_token_id=0, **options
    )
    return found[:, IDS.shape[1] :].numpy()


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_generation_is_the_same_token_for_token(name: str, tmp_path: Path) -> None:
    theirs, model, variables = both(name, tmp_path)
    # Decoders with tied embeddings and random weights repeat themselves for ever, unless they may not.
    tied = theirs.config.tie_word_embeddings
    expected = continued(theirs, NEW, **(dict(no_repeat_ngram_size=2) if tied else {}))
    assert expected.shape == (2, NEW) and len({*expected[0].tolist()}) > 5
    found = generate(model, variables, IDS, max_new_tokens=NEW, processors=(NoRepeat(2),) if tied else ())
    np.testing.assert_array_equal(found.tokens, expected)


def test_beam_search_and_processors_are_the_same(tmp_path: Path) -> None:
    theirs, model, variables = both("llama", tmp_path)
    ends = (3, 11)
    for beam, options in (
        (Beam(3, length_penalty=0.3, early_stopping=True), {}),
        (
            Beam(4, length_penalty=1.7, early_stopping="never"),
            dict(repetition_penalty=1.4, no_repeat_ngram_size=2),
        ),
        (Beam(2, length_penalty=-1.0), dict(min_new_tokens=6)),
    ):
        processors: list[Any] = [MinNewTokens(6, ends)] if "min_new_tokens" in options else []
        if "repetition_penalty" in options:
            processors = [RepetitionPenalty(1.4), NoRepeat(2)]
        expected = theirs.generate(
            torch.from_numpy(IDS), max_new_tokens=16, do_sample=False, pad_token_id=60, eos_token_id=list(ends),
            num_beams=beam.size, length_penalty=beam.length_penalty, early_stopping=beam.early_stopping,
            return_dict_in_generate=True, output_scores=True, **options,
        )  # fmt: skip
        found = generate(
            model, variables, IDS, max_new_tokens=16, pad=60, eos=ends, sampler=beam, processors=processors
        )
        tokens = expected.sequences[:, IDS.shape[1] :].numpy()
        np.testing.assert_array_equal(found.tokens[:, : tokens.shape[1]], tokens)
        assert np.all(found.tokens[:, tokens.shape[1] :] == 60)
        np.testing.assert_allclose(found.scores, expected.sequences_scores.numpy(), rtol=1e-4)
