"""Judges a decoder by what it says: its answers to questions about pictures, against what people answered."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlpjax.config import suggest
from vlpjax.data.pipeline import Pipeline
from vlpjax.errors import UserError
from vlpjax.evaluators.base import Evaluator, Result, Variables, finite_batches, require_finite, to_host
from vlpjax.evaluators.pictures import drawn
from vlpjax.evaluators.text_scores import KINDS, blind, score
from vlpjax.experiment import Experiment
from vlpjax.mesh import Layout
from vlpjax.models.decoding import Prompt, align
from vlpjax.models.generate import Choice, advance, begin
from vlpjax.models.sampling import Greedy
from vlpjax.objectives.base import Context
from vlpjax.objectives.next_token import NextToken
from vlpjax.objectives.visual_next_token import VisualNextToken

OTHER = "other_pictures"


class Said(NamedTuple):
    """New tokens of a batch.

    Attributes:
      ids: [B, max_new_tokens], an end of text included.
      lengths: [B], tokens that count.
      sound: [B], whether all that the decoder read was finite.
    """

    ids: jax.Array
    lengths: jax.Array
    sound: jax.Array


class Programs(NamedTuple):
    """What is compiled once.

    Attributes:
      generate: from variables, prompts without embeddings, and fields that the objective reads, to new tokens.
      take: rows of an array that lies over the mesh, by their numbers.
    """

    generate: Callable[[Variables, Prompt, Mapping[str, jax.Array]], Said]
    take: Callable[[jax.Array, np.ndarray], jax.Array]


class Rows(NamedTuple):
    """A batch as questions, on the host.

    Attributes:
      ids: [B, T + 1].
      examples: [B], their numbers in the source.
      spans: [B, 2], where the last turn of each row begins and ends.
      usable: [B], whether a row can be judged.
      prompts: what stands before the last turns, over the mesh.
    """

    ids: np.ndarray
    examples: np.ndarray
    spans: np.ndarray
    usable: np.ndarray
    prompts: Prompt


class Case(NamedTuple):
    """One row that was answered.

    Attributes:
      answer, references: what the model said, and what is right.
      other: what it said to another row's pictures; None if it was not asked.
      frames: of the row, [F, H, W, C]; None where they are not shown.
    """

    answer: str
    references: list[str]
    other: str | None = None
    frames: np.ndarray | None = None


@dataclass(frozen=True)
class GeneratedAnswers(Evaluator):
    """What a decoder answers in the last turn of each conversation, and how right that is.

    A row of ``data`` is one of training's, made by the same transforms; it is cut before the last run of tokens that
    are asked for, and the decoder goes on from there, taking the likeliest token each time, with a key-value cache.
    It reads what it does in training: the objective says which towers encode the pictures, and whether prompts see all
    of themselves.  Rows lie over all devices of the mesh, those of the sequence axes too.

    Reported are the scores of :mod:`vlpjax.evaluators.text_scores`; beside them, as chance, what answers of other rows
    would score; ``answered``, the rows that were judged; and ``left_out``, those that were not, because they cannot be
    read, hold no question, have a longer one than ``prompt_length``, lead to values that are not finite, or, where
    prompts see all of themselves, have earlier turns of the assistant, which do not.

    Attributes:
      data: a finite pipeline with the fields that the objective reads, one text to a row, also where training packs.
      tokenizer: of the rows; tokens that it does not have say nothing.
      objective: its name in the config, a :class:`vlpjax.objectives.next_token.NextToken` with a ``weight_field``.
      kinds: of scores: ``"exact"`` (all words), ``"keywords"`` (their share), ``"letter"`` (of the option that is
        chosen), ``"vqa"``, ``"captions"`` (BLEU-4, ROUGE-L and CIDEr-D) and ``"yes_no"``, which compares with the first
        reference.
      references: field of the source's examples with one text, several parted by ``separator``, or a list of them;
        empty takes what the assistant says in the row.
      max_new_tokens: where an answer ends at the latest.
      prompt_length: tokens of the longest prompt, to compute no more than that; None is a row's.
      other_pictures: also asks every row about another row's pictures (as many, half a batch away) and reports these
        scores under ``"other_pictures/"``: what is said without seeing.  Rows that no other has as many pictures as, in
        their batch, are not asked.
      examples: so many rows are shown in the report.

    Raises:
      UserError: settings that cannot be; when it runs, data of which no row can be judged.
    """

    data: Pipeline | None = None
    tokenizer: Any = None
    objective: str = "next"
    kinds: tuple[str, ...] = ("exact", "keywords")
    references: str = ""
    separator: str = "|"
    max_new_tokens: int = 16
    prompt_length: int | None = None
    other_pictures: bool = False
    examples: int = 8

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise UserError(f"GeneratedAnswers.kinds names {kind!r}{suggest(kind, KINDS)}.")
        if not self.kinds or self.max_new_tokens < 1 or self.prompt_length == 0:
            raise UserError(
                f"GeneratedAnswers has kinds={self.kinds}, max_new_tokens={self.max_new_tokens} and "
                f"prompt_length={self.prompt_length}; it takes one kind or more, and lengths from 1 on."
            )

    def make(self, experiment: Experiment, layout: Layout) -> Callable[[Variables], Result]:
        if self.data is None or self.tokenizer is None:
            raise UserError(
                "GeneratedAnswers needs both 'data' and 'tokenizer'; the config leaves one of them out."
            )
        data = self.data
        require_finite(data, "GeneratedAnswers")
        objective = self._objective(experiment)
        programs = Programs(
            self._generate(experiment, objective, layout),
            jax.jit(lambda x, rows: x[rows], out_shardings=layout.sharding("frames")),
        )

        def evaluate(variables: Variables) -> Result:
            cases: list[Case] = []
            for batch in finite_batches(data, layout):
                shown = self.examples - len(cases)
                cases += self._answer(objective, programs, variables, batch, layout, shown)
            if not cases:
                raise UserError(f"GeneratedAnswers: of {data.num_examples} examples none can be judged.")
            return self._result(cases, data.num_examples)

        return evaluate

    def _objective(self, experiment: Experiment) -> NextToken:
        name = self.objective
        if name not in experiment.objectives:
            raise UserError(f"GeneratedAnswers.objective is {name!r}{suggest(name, experiment.objectives)}.")
        objective = experiment.objectives[name][1]
        if not isinstance(objective, NextToken) or not objective.weight_field:
            raise UserError(
                f"GeneratedAnswers.objective is {name!r}, {objective}; it takes a NextToken with a weight_field, which "
                "says what is answered."
            )
        if self.other_pictures and not isinstance(objective, VisualNextToken):
            raise UserError(
                f"GeneratedAnswers.other_pictures is set, but the objective {name!r} reads no pictures."
            )
        return objective

    def _generate(self, experiment: Experiment, objective: NextToken, layout: Layout) -> Any:
        """New tokens after a batch of prompts, one program for reading pictures, prompts, and all of an answer."""
        # Tokens of a row stay together: a prompt is short, and one token at a time cannot be dealt out.
        rows = dataclasses.replace(
            layout, rules={**layout.rules, "batch": layout.rules["frames"], "sequence": ()}
        )
        model: Any = experiment.towers.makers[objective.decoder]()
        eos = self.tokenizer.eos_id
        choice = Choice(Greedy(), (), () if eos is None else (eos,), self.tokenizer.pad_id)
        key = jax.random.key(experiment.seed)

        def generate(variables: Variables, prompt: Prompt, batch: Mapping[str, jax.Array]) -> Said:
            def read(towers: Any) -> dict[str, Any]:
                context = Context(
                    towers, batch, key, jnp.zeros((), jnp.int32), train=False, objective=self.objective,
                    durations=experiment.durations,
                )  # fmt: skip
                return objective.given(context, prompt.ids, None)

            with rows.activate():
                given: Any = experiment.towers.apply(variables, method=read)
                embeddings = given.get("embeddings")
                count, decoder = prompt.ids.shape[1], {"params": variables["params"][objective.decoder]}
                state = begin(
                    model, decoder, prompt._replace(embeddings=embeddings), key, choice=choice,
                    max_new_tokens=self.max_new_tokens, prefix_lm=objective.prefix_lm,
                )  # fmt: skip
                last = jnp.asarray(count + self.max_new_tokens)
                state = advance(model, decoder, prompt.read(), state, last, choice=choice)
            sound = jnp.ones(len(prompt.ids), bool)
            if embeddings is not None:
                sound = jnp.all(jnp.isfinite(embeddings), axis=(1, 2))
            return Said(state.ids[:, count:], state.lengths, sound)

        return jax.jit(generate, out_shardings=layout.replicated)

    def _answer(
        self,
        objective: NextToken,
        programs: Programs,
        variables: Variables,
        batch: Mapping[str, jax.Array],
        layout: Layout,
        shown: int,
    ) -> list[Case]:
        """The rows of a batch that can be judged, in their order; ``shown`` of them with their pictures."""
        rows = self._questions(objective, batch, layout)
        said = jax.device_get(programs.generate(variables, rows.prompts, _read(batch)))
        rows = rows._replace(usable=rows.usable & said.sound)
        others, frames = dict[int, str](), None
        if isinstance(objective, VisualNextToken):
            if self.other_pictures:
                others = self._others(objective, programs, variables, batch, rows)
            frames = to_host(batch[objective.image_field], layout) if shown > 0 else None
        cases = list[Case]()
        for row in np.flatnonzero(rows.usable).tolist():
            references = self._references(int(rows.examples[row]), rows.ids[row, slice(*rows.spans[row])])
            picture = frames[row] if frames is not None and len(cases) < shown else None
            cases.append(Case(self._text(said, row), references, others.get(row), picture))
        return cases

    def _questions(self, objective: NextToken, batch: Mapping[str, jax.Array], layout: Layout) -> Rows:
        """A batch as questions."""
        names = (objective.field, objective.weight_field, "index", "valid")
        for name in names:
            if name not in batch:
                raise UserError(f"GeneratedAnswers reads {name!r} from the batch{suggest(name, batch)}.")
        if objective.segment_field in batch:
            raise UserError(
                f"GeneratedAnswers.data has {objective.segment_field!r}: its rows are packed, but an answer follows "
                "a row of one text."
            )
        ids, weights, index, usable = (to_host(batch[name], layout) for name in names)
        spans = np.array([last_turn(row) for row in weights])
        lengths = spans[:, 0]
        most = min(self.prompt_length or ids.shape[1], ids.shape[1] - 1)
        usable = usable & (lengths >= 1) & (lengths <= most)
        if objective.prefix_lm:
            usable &= [not (row[:first] > 0).any() for row, first in zip(weights, lengths, strict=True)]
        prompts = align(ids[:, :most], np.where(usable, lengths, 1))
        # What stands before a prompt must not be taken for a picture.
        before = np.arange(most) < np.asarray(prompts.start)[:, None]
        shown: Any = np.where(before, self.tokenizer.pad_id, prompts.ids).astype(np.int32)
        prompts = jax.device_put(prompts._replace(ids=shown), layout.sharding("frames"))
        return Rows(ids, index, spans, usable, prompts)

    def _others(
        self,
        objective: VisualNextToken,
        programs: Programs,
        variables: Variables,
        batch: Mapping[str, jax.Array],
        rows: Rows,
    ) -> dict[int, str]:
        """What is said in rows that see the pictures of others."""
        asked = np.arange(rows.ids.shape[1]) < rows.spans[:, :1]
        pictures = np.sum((rows.ids == objective.placeholder) & asked, axis=1)
        order = another_row(np.where(rows.usable, pictures, 0))
        frames = programs.take(batch[objective.image_field], order)
        moved = _read({**batch, objective.image_field: frames})
        said = jax.device_get(programs.generate(variables, rows.prompts, moved))
        return {
            int(row): self._text(said, int(row)) for row in np.flatnonzero(order != np.arange(len(order)))
        }

    def _text(self, said: Said, row: int) -> str:
        return self._decode(np.asarray(said.ids[row, : int(said.lengths[row])]))

    def _decode(self, ids: np.ndarray) -> str:
        known = [int(one) for one in ids if 0 <= one < self.tokenizer.vocab_size]
        return str(self.tokenizer.decode(known)).strip()

    def _references(self, index: int, ids: np.ndarray) -> list[str]:
        """What is right for an example of the source, whose row has these ids in its last turn."""
        if not self.references:
            return [self._decode(ids)]
        assert self.data is not None
        example = self.data.source[index]
        if self.references not in example:
            raise UserError(
                f"GeneratedAnswers.references is {self.references!r}{suggest(self.references, example)}."
            )
        texts = example[self.references]
        texts = texts.split(self.separator) if isinstance(texts, str) else texts
        return [str(text).strip() for text in texts]

    def _result(self, cases: Sequence[Case], examples: int) -> Result:
        references = [case.references for case in cases]
        metrics = score(self.kinds, [case.answer for case in cases], references)
        chance = blind(self.kinds, references)
        if self.other_pictures:
            asked = [case for case in cases if case.other is not None]
            if not asked:
                raise UserError(
                    "GeneratedAnswers.other_pictures: no two rows of a batch have equally many pictures."
                )
            found = score(
                self.kinds, [str(case.other) for case in asked], [case.references for case in asked]
            )
            metrics |= {f"{OTHER}/{name}": value for name, value in found.items()}
        metrics |= {"answered": float(len(cases)), "left_out": float(examples - len(cases))}
        return Result(metrics, chance, list(_shown(cases[: self.examples])))


def last_turn(weights: np.ndarray) -> tuple[int, int]:
    """Where the last run of tokens that count begins and ends; (0, 0) if none does."""
    asked = np.flatnonzero(weights > 0)
    if not len(asked):
        return 0, 0
    gaps = np.flatnonzero(np.diff(asked) > 1)
    return int(asked[gaps[-1] + 1] if len(gaps) else asked[0]), int(asked[-1]) + 1


def another_row(pictures: np.ndarray) -> np.ndarray:
    """Per row another one with as much to see, half of all such rows away; itself where there is none.

    Args:
      pictures: int [N], visual tokens of each row; rows with 0 stay.
    """
    order = np.arange(len(pictures))
    for count in np.unique(pictures[pictures > 0]):
        places = np.flatnonzero(pictures == count)
        order[places] = np.roll(places, -(len(places) // 2))
    return order


def _read(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """What the objective may read of a batch."""
    return {name: value for name, value in batch.items() if name not in ("index", "valid")}


def _shown(cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
    """For the report: per case its pictures, the first with what was said about them."""
    frames = [case.frames for case in cases if case.frames is not None]
    low = min((float(one.min()) for one in frames), default=0.0)
    high = max((float(one.max()) for one in frames), default=1.0)
    for case in cases:
        right = case.answer.lower() in [reference.lower() for reference in case.references]
        text = f"says “{case.answer}”" + ("" if right else f", not “{case.references[0]}”")
        # Room that a row has for more pictures is of one colour.
        given = [] if case.frames is None else [one for one in case.frames if one.min() != one.max()]
        pictures: list[dict[str, Any]] = [{"image": drawn(one, low, high)} for one in given] or [{}]
        pictures[0]["text"] = text
        yield {"pictures": pictures}
