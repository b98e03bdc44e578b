"""BERT weights: equal to `transformers` in both directions, with and without the head, in old and new spellings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from tests.weights.parity import Outputs, assert_identical, check, hidden_states, layers, randomize
from vlpjax.errors import UserError
from vlpjax.models.text import MaskedLanguageHead, TextTransformer
from vlpjax.models.towers import Towers
from vlpjax.weights import from_pretrained, save_pretrained
from vlpjax.weights.families.bert import FAMILY

IDS = np.array([[2, 11, 7, 40, 3, 0, 0], [2, 5, 3, 0, 0, 0, 0], [2, 4, 9, 8, 50, 21, 3]], np.int32)
TYPES = np.array([[0, 0, 0, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 2, 2]], np.int32)
REAL = (IDS != 0)[..., None]  # what padding attends to is nobody's business
LAYERS = tuple(range(3))


def config(**changes: Any) -> transformers.BertConfig:
    fields = dict(
        vocab_size=53,
        hidden_size=36,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=50,
        max_position_embeddings=11,
        type_vocab_size=3,
        hidden_act="gelu",
    )
    return transformers.BertConfig(**{**fields, **changes})


def run_theirs(peer: Any) -> Outputs:
    out = peer(
        torch.tensor(IDS),
        attention_mask=torch.tensor(IDS != 0).long(),
        token_type_ids=torch.tensor(TYPES),
        output_hidden_states=True,
    )
    found = {name: state * torch.tensor(REAL) for name, state in hidden_states(out.hidden_states).items()}
    if isinstance(peer, transformers.BertForMaskedLM):
        return {**found, "logits": out.logits * torch.tensor(REAL)}
    return {**found, "tokens": out.last_hidden_state * torch.tensor(REAL), "pooled": out.pooler_output}


def run_tower(model: TextTransformer, variables: Any) -> Outputs:
    out = model.apply(variables, IDS, types=TYPES, hidden=LAYERS)
    found = {name: state * REAL for name, state in layers(out["hidden"]).items()}
    return {**found, "tokens": out["tokens"] * REAL, "pooled": out["pooled"]}


def run_masked(model: Towers, variables: Any) -> Outputs:
    def call(towers: Towers) -> Outputs:
        out = towers.call("text", IDS, types=TYPES, hidden=LAYERS)
        table = variables["params"]["text"]["token_embedding"]["embedding"]
        logits = towers.call("mlm_head", out["tokens"], table)
        return {**{name: x * REAL for name, x in layers(out["hidden"]).items()}, "logits": logits * REAL}

    return model.apply(variables, method=call)


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BertModel as `transformers` writes it."""
    folder = tmp_path_factory.mktemp("bert")
    randomize(transformers.BertModel(config())).save_pretrained(folder)
    return folder


def renamed(folder: Path, target: Path, rename: Any) -> Path:
    """A copy of a folder whose tensors have other names; those that become None are left out."""
    target.mkdir()
    (target / "config.json").write_text((folder / "config.json").read_text())
    tensors = {rename(name): x for name, x in load_file(folder / "model.safetensors").items()}
    save_file({name: x for name, x in tensors.items() if name}, target / "model.safetensors")
    return target


def test_the_tower_equals_theirs(tmp_path: Path) -> None:
    parity = check(transformers.BertModel(config()), tmp_path, run_theirs, run_tower)
    assert isinstance(parity.model, TextTransformer) and parity.model.types == 3


def test_the_tower_with_its_head_equals_theirs(tmp_path: Path) -> None:
    peer = transformers.BertForMaskedLM(config(hidden_act="gelu_new"))
    parity = check(peer, tmp_path, run_theirs, run_masked)
    assert list(parity.model) == ["text", "mlm_head"]


def test_old_spellings_and_a_prefix_are_read(peer: Path, tmp_path: Path) -> None:
    def old(name: str) -> str:
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        return f"bert.{name}"

    model, variables = from_pretrained(renamed(peer, tmp_path / "old", old))
    save_pretrained(model, variables, tmp_path / "new")
    assert_identical(peer, tmp_path / "new")


def test_heads_that_a_tower_does_not_have_are_left_out(peer: Path, tmp_path: Path) -> None:
    folder = renamed(peer, tmp_path / "pretraining", lambda name: f"bert.{name}")
    tensors = load_file(folder / "model.safetensors")
    extra = {"cls.seq_relationship.weight": np.ones((2, 36), np.float32)}
    save_file({**tensors, **extra}, folder / "model.safetensors")
    assert isinstance(from_pretrained(folder)[0], TextTransformer)


def test_a_tensor_that_is_missing_is_named(peer: Path, tmp_path: Path) -> None:
    lost = "encoder.layer.1.attention.self.key.weight"
    folder = renamed(peer, tmp_path / "lost", lambda name: None if name == lost else name)
    with pytest.raises(
        UserError, match=r"block_1/attention/key/kernel.*encoder\.layer\.1\.attention\.self\.key"
    ):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [("is_decoder", True), ("position_embedding_type", "relative_key"), ("hidden_act", "tanh")],
)
def test_options_that_the_tower_has_not_are_told(peer: Path, tmp_path: Path, field: str, value: Any) -> None:
    written = json.loads((peer / "config.json").read_text())
    with pytest.raises(UserError, match=f"{value!r}"):
        FAMILY.build({**written, field: value})


@pytest.mark.parametrize("change", [{"pool": "mean"}, {"causal": True}, {"order": "pre"}, {"embedding": 8}])
def test_towers_that_bert_cannot_hold_are_told(peer: Path, change: dict[str, Any]) -> None:
    model = FAMILY.build(json.loads((peer / "config.json").read_text()))
    (field,) = change
    with pytest.raises(UserError, match=rf"TextTransformer\.{field} is"):
        FAMILY.describe(model.clone(**change))


def test_a_head_of_another_size_is_told(peer: Path) -> None:
    tower = FAMILY.build(json.loads((peer / "config.json").read_text())).clone(pooler=False)
    towers = Towers.of({"text": tower, "mlm_head": MaskedLanguageHead(tower.vocabulary + 1)})
    with pytest.raises(UserError, match=r"MaskedLanguageHead\.vocabulary is 54"):
        FAMILY.describe(towers)


def test_a_scanned_tower_is_written_and_read_alike(peer: Path, tmp_path: Path) -> None:
    model, variables = from_pretrained(peer)
    scanned = model.clone(scan=True)
    params = dict(variables["params"])
    blocks = [params.pop(f"block_{layer}") for layer in LAYERS]
    params["blocks"] = jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)
    save_pretrained(scanned, {"params": params}, tmp_path / "scanned")
    assert_identical(peer, tmp_path / "scanned")
