"""Tower speed: forward and backward of our towers beside `transformers`' on the same machine, in turn.

    python tools/bench_towers.py
    python tools/bench_towers.py --towers=vit_s,bert --pairs=7 --batch=4

Both sides compute the gradient of the mean square of the final features with regard to all parameters, in float32,
on all cores, at the same batch and length, with random weights, dropout off, and PyTorch's default ("sdpa")
attention.  Turns alternate within one process and what is reported is the median over the pairs of theirs / ours:
above 1, ours is faster.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from tools._turns import HEADING, Pair, Turn, alternate, parse, row
from vlpjax.models.decoder import Decoder
from vlpjax.models.positions import Rotary
from vlpjax.models.text import TextTransformer
from vlpjax.models.vit import ViT
from vlpjax.models.vit_variants import variant


@dataclass(frozen=True)
class Tower:
    """A pair of equal towers.

    Attributes:
      title: for the table.
      ours: the module; ``inputs`` makes what it is called with.
      theirs: makes the PyTorch module, and ``call`` its features from the same inputs.
    """

    title: str
    ours: nn.Module
    inputs: Callable[[np.random.Generator, int], np.ndarray]
    theirs: Callable[[], Any]
    call: Callable[[Any, Any], Any]


def images(rng: np.random.Generator, batch: int) -> np.ndarray:
    return rng.normal(size=(batch, 224, 224, 3)).astype(np.float32)


def ids(vocabulary: int, length: int) -> Callable[[np.random.Generator, int], np.ndarray]:
    return lambda rng, batch: rng.integers(3, vocabulary, (batch, length)).astype(np.int32)


def vit(name: str) -> Tower:
    fields = variant(name)

    def theirs() -> Any:
        from transformers import ViTConfig, ViTModel

        config = ViTConfig(
            hidden_size=fields["width"],
            num_hidden_layers=fields["depth"],
            num_attention_heads=fields["heads"],
            intermediate_size=4 * fields["width"],
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return ViTModel(config, add_pooling_layer=False)

    def call(model: Any, pixels: Any) -> Any:
        return model(pixels.permute(0, 3, 1, 2)).last_hidden_state

    return Tower(f"ViT-{name}, 224 px", ViT(**fields, patch_bias=True, pre_norm=False), images, theirs, call)


def bert() -> Tower:
    vocabulary, length = 30_522, 128

    def theirs() -> Any:
        from transformers import BertConfig, BertModel

        config = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        return BertModel(config, add_pooling_layer=False)

    ours = TextTransformer(
        vocabulary, 512, width=768, depth=12, heads=12, causal=False, mask_padding=True, pool="cls", order="post",
        types=2, embedding_norm=True, final_norm=False, epsilon=1e-12,
    )  # fmt: skip
    return Tower(
        f"BERT-base, {length} tokens",
        ours,
        ids(vocabulary, length),
        theirs,
        lambda model, tokens: model(tokens).last_hidden_state,
    )


def decoder() -> Tower:
    vocabulary, length, width, depth, heads, kv_heads, hidden = 32_000, 256, 640, 14, 10, 5, 1792

    def theirs() -> Any:
        from transformers import LlamaConfig, LlamaModel

        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            intermediate_size=hidden,
            use_cache=False,
        )
        return LlamaModel(config)

    ours = Decoder(vocabulary, width, depth, heads, kv_heads, mlp_dim=hidden, rotary=Rotary())
    return Tower(
        f"decoder of 100M parameters, {length} tokens",
        ours,
        ids(vocabulary, length),
        theirs,
        lambda model, tokens: model(tokens).last_hidden_state,
    )


TOWERS: dict[str, Callable[[], Tower]] = {
    "vit_s": lambda: vit("S/16"),
    "vit_b": lambda: vit("B/16"),
    "bert": bert,
    "decoder": decoder,
}


def our_turn(tower: Tower, inputs: np.ndarray) -> tuple[Turn, int]:
    """One gradient of ours, waited for, and the number of parameters."""
    options = {"logits": False} if isinstance(tower.ours, Decoder) else {}
    variables = jax.jit(lambda key: nn.meta.unbox(tower.ours.init(key, inputs, **options)))(jax.random.key(0))
    batch = jnp.asarray(inputs)

    @jax.jit
    def gradient(params: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.mean(jnp.square(tower.ours.apply({"params": params}, batch, **options)["tokens"]))

        return jax.grad(loss)(params)

    def turn() -> None:
        jax.block_until_ready(gradient(variables["params"]))

    return turn, sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def their_turn(tower: Tower, inputs: np.ndarray) -> tuple[Turn, int]:
    """The same of theirs."""
    import torch

    model = tower.theirs().train()
    batch = torch.from_numpy(inputs if inputs.dtype == np.float32 else inputs.astype(np.int64))

    def turn() -> None:
        model.zero_grad(set_to_none=True)
        tower.call(model, batch).square().mean().backward()

    return turn, sum(parameter.numel() for parameter in model.parameters())


def compare(tower: Tower, batch: int, pairs: int) -> tuple[tuple[int, int], Pair]:
    """Both numbers of parameters, and the seconds of both."""
    inputs = tower.inputs(np.random.default_rng(0), batch)
    (ours, our_size), (theirs, their_size) = our_turn(tower, inputs), their_turn(tower, inputs)
    return (our_size, their_size), alternate(ours, theirs, pairs)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments, __doc__, "towers", TOWERS, 4)
    print(HEADING)
    for name in options.names:
        tower = TOWERS[name]()
        print(row(tower.title, *compare(tower, options.batch, options.pairs)), flush=True)


if __name__ == "__main__":
    main()
