"""The captioning loss: a decoder that sees the image predicts each token of its caption from those before."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from vlpjax.models.vocabulary_loss import vocabulary_loss
from vlpjax.objectives.base import BatchCoupled, Context, Loss, pick


@dataclass(frozen=True)
class Captioning(BatchCoupled):
    """Cross-entropy of every token of a caption but the first, given the image and the tokens before it.

    Texts need a first token that says nothing, because nobody is asked for it: a start token (``Tokenize(bos=True)``)
    or, where the tokenizer has none, a word that begins every caption.

    L = sum over texts and their tokens of -log p(token | earlier tokens, image), over the number of tokens; padding is
    neither.  As the number of tokens is the whole batch's, the loss couples its examples, if weakly; accumulation is
    exact.

    Attributes:
      image, text: names of the towers.
      image_field, text_field: the fields of the batch that they read; the text's are token ids.
      image_output: what the decoder attends to, of the image tower's outputs, [B, M, D].
      text_output: what the decoder continues, of the text tower's outputs, [B, L, D]; no entry may have seen a later
        token.
      decoder: name of the tower that takes both and returns ``"tokens"`` and the vocabulary's ``"kernel"``.
      pad_id: the id that fills texts up.
      chunk: tokens of each text whose logits exist at once.

    Source: "CoCa: Contrastive Captioners are Image-Text Foundation Models", arXiv 2205.01917, equation 4.
    """

    image: str = "image"
    text: str = "text"
    image_field: str = "image"
    text_field: str = "text"
    image_output: str = "memory"
    text_output: str = "tokens"
    decoder: str = "decoder"
    pad_id: int = 0
    chunk: int = 16

    def encode(self, context: Context) -> dict[str, jax.Array]:
        ids = context.read(self.text_field)
        memory = pick(context.encode(self.image, self.image_field), self.image_output)
        tokens = pick(context.encode(self.text, self.text_field), self.text_output)
        found = context.student.call(self.decoder, tokens[:, :-1], memory, train=context.train)
        labels = ids[:, 1:]
        counted = (labels != self.pad_id).astype(jnp.float32)
        _, each = vocabulary_loss(found["tokens"], found["kernel"], labels, counted, chunk=self.chunk)
        return {
            "nats": jnp.sum(counted * each.nats, axis=1),  # [B]
            "correct": jnp.sum(counted * each.correct, axis=1),
            "tokens": jnp.sum(counted, axis=1),
        }

    def compare(self, features: dict[str, jax.Array], context: Context) -> Loss:
        del context
        total = jnp.maximum(jnp.sum(features["tokens"]), 1.0)
        return Loss(jnp.sum(features["nats"]) / total, {"accuracy": jnp.sum(features["correct"]) / total})
