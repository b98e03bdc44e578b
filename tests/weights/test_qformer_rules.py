"""The Q-Former under weights of `transformers`: equal outputs with and without a text, and every name accounted for."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn

from tests.weights.parity import compare, randomize
from vlpjax.models.qformer import QFormer
from vlpjax.weights.families.qformer_rules import QFORMER, QUERIES, TEXTS
from vlpjax.weights.family import Family
from vlpjax.weights.layout import under
from vlpjax.weights.matching import match_tensors, members

IMAGE = np.random.default_rng(0).standard_normal((2, 9, 14)).astype(np.float32)
IDS = np.array([[5, 9, 3, 0, 0], [7, 2, 1, 8, 4]], np.int32)
LENGTHS = np.array([9, 6])
MODEL = QFormer(queries=4, width=24, depth=3, heads=3, mlp_dim=40, vocabulary=17, length=8, embedding=10)
FAMILY = Family(
    name="qformer",
    model_types=(),
    architecture="",
    build=lambda config: MODEL,
    describe=lambda model: {},
    rules=(*under("", "qformer.", QFORMER), *QUERIES, *TEXTS),
    example=lambda model: (),
)


def config() -> Any:
    return transformers.Blip2QFormerConfig(
        vocab_size=17, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=8, encoder_hidden_size=14, use_qformer_text_input=True,
    )  # fmt: skip


class Peer(torch.nn.Module):
    """The parts of ``Blip2ForImageTextRetrieval`` that are about the Q-Former."""

    def __init__(self) -> None:
        from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

        super().__init__()
        self.qformer = transformers.Blip2QFormerModel(config())
        self.embeddings = Blip2TextEmbeddings(config())
        self.query_tokens = torch.nn.Parameter(torch.zeros(1, 4, 24))
        self.vision_projection = torch.nn.Linear(24, 10)
        self.text_projection = torch.nn.Linear(24, 10)


@pytest.fixture(scope="module")
def peer() -> Peer:
    peer = Peer()
    randomize(peer)
    return peer


@pytest.fixture(scope="module")
def variables(peer: Peer) -> Any:
    """The peer's weights as ours, by the rules."""
    shapes = jax.eval_shape(lambda: MODEL.init(jax.random.key(0), IMAGE, IDS))
    tensors = {name: x.detach().numpy() for name, x in peer.named_parameters()}
    pieces = match_tensors(
        FAMILY, members(shapes), {name: x.shape for name, x in tensors.items()}, {}, "the peer"
    )
    found = {piece.member.path: piece.binding.to_ours(tensors[piece.tensor]) for piece in pieces}
    shapes = nn.meta.unbox(shapes)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: found["/".join(str(key.key) for key in path)], shapes
    )


def test_queries_equal_theirs(peer: Peer, variables: Any) -> None:
    seen = np.arange(9) < LENGTHS[:, None]
    with torch.no_grad():
        theirs = peer.qformer(
            query_embeds=peer.query_tokens.expand(2, -1, -1),
            encoder_hidden_states=torch.tensor(IMAGE),
            encoder_attention_mask=torch.tensor(seen).long(),
            output_hidden_states=True,
        )
        projected = peer.vision_projection(theirs.last_hidden_state)
    ours = jax.jit(lambda v: MODEL.apply(v, IMAGE, image_lengths=LENGTHS, hidden=(0, 1, 2)))(variables)
    found = {"tokens": ours["tokens"], "embedding": ours["embedding"]}
    expected = {"tokens": theirs.last_hidden_state, "embedding": projected}
    for layer in range(3):
        found[f"hidden_{layer}"] = ours["hidden"][layer]
        expected[f"hidden_{layer}"] = theirs.hidden_states[layer + 1]
    compare(found, expected)


def test_queries_and_text_equal_theirs(peer: Peer, variables: Any) -> None:
    seen = torch.tensor(np.concatenate([np.ones((2, 4)), IDS != 0], axis=1)).long()
    with torch.no_grad():
        theirs = peer.qformer(
            query_embeds=peer.embeddings(torch.tensor(IDS), query_embeds=peer.query_tokens.expand(2, -1, -1)),
            query_length=4,
            attention_mask=seen,
            encoder_hidden_states=torch.tensor(IMAGE),
        )
    ours = jax.jit(lambda v: MODEL.apply(v, IMAGE, IDS, hidden=(-1,)))(variables)
    real = seen.numpy()[..., None]
    compare({"all": ours["hidden"][-1] * real}, {"all": theirs.last_hidden_state * torch.tensor(real)})
    # The same numbers, which the compiler may work out once for each.
    np.testing.assert_allclose(ours["hidden"][-1][:, :4], ours["tokens"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours["hidden"][-1][:, 4:], ours["text_tokens"], rtol=1e-5, atol=1e-6)


def test_a_text_alone_equals_theirs(peer: Peer, variables: Any) -> None:
    seen = torch.tensor(IDS != 0).long()
    with torch.no_grad():
        theirs = peer.qformer(
            query_embeds=peer.embeddings(torch.tensor(IDS)), query_length=0, attention_mask=seen
        )
        projected = peer.text_projection(theirs.last_hidden_state[:, 0])
    ours = jax.jit(lambda v: MODEL.apply(v, ids=IDS))(variables)
    compare(
        {"first": ours["text_pooled"], "embedding": ours["text_embedding"]},
        {"first": theirs.last_hidden_state[:, 0], "embedding": projected},
    )
