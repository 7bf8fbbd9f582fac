"""Counts decoded answers by slice and class of mistake, and keeps some of them as samples."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instrdiv.config.groups import Group
from instrdiv.config.pools import RulePools
from instrdiv.config.settings import TaskSetting
from instrdiv.config.sweep import Sweep
from instrdiv.evaluation.decoding import Answers, GroupDecoder, Prompts
from instrdiv.evaluation.rows import identity
from instrdiv.evaluation.test_sets import make_test_set, stream_of_split
from instrdiv.runtime.streams import TEST_STREAM, stream_key
from instrdiv.runtime.tables import Row
from instrdiv.tasks.conditions import Condition, held_out
from instrdiv.tasks.task import Task
from instrdiv.tasks.tokens import before_end
from instrdiv.training.members import Trainer
from instrdiv.training.population import stack_knobs


def split_prompts(sweep: Sweep, group: Group, pools: RulePools, split: str) -> Prompts:
    """The tests of a split (see ``make_test_set``) as prompts to decode."""
    tests = make_test_set(split, group.members, pools, sweep.dev_tests, sweep.tests)
    streams = jnp.array([stream_of_split(split, m.setting.split_seed) for m in group.members], jnp.uint32)
    keys = jax.vmap(lambda stream: stream_key(TEST_STREAM, stream))(streams)
    knobs = stack_knobs([member.setting for member in group.members])
    return Prompts(knobs, keys, tests.rules, tests.rules, relations=tests.relations)


def decode_split(
    sweep: Sweep, trainer: Trainer, pools: RulePools, split: str, piece: int, samples: int = 8
) -> tuple[list[Row], list[Row]]:
    """Rows of errors.csv and samples.csv for a split's tests in the headline slice, for all members in training.

    The tests are those of ``make_test_set``. ``piece`` is the number of tests per call of the program, a multiple
    of the mesh's data axis; ``samples`` is the number of answers to return per member.
    """
    group, headline = trainer.group, trainer.group.task.headline
    prompts = split_prompts(sweep, group, pools, split)
    decoder = GroupDecoder(group, group.shape, trainer.mesh, trainer.members_per_vmap, piece)
    condition = Condition(split, held_out)
    counts, shown = tally(decoder.answers(trainer.state.params, prompts), condition, samples, group)
    errors, sampled = [], []
    for row, member in enumerate(group.members):
        who = identity(sweep.figure, group, member, trainer.step)
        if counts[row, 0, 0]:
            errors += error_rows(who, group.task, split, headline, counts[row, 0])
        sampled += [who | {"split": split, "slice": headline} | sample for sample in shown[row, 0]]
    return errors, sampled


def tally(
    answers: Iterable[Answers], condition: Condition, samples: int, group: Group
) -> tuple[np.ndarray, dict[tuple[int, int], list[Row]]]:
    """Counts answers by slice and class of mistake, piece by piece.

    Returns:
      int [M, slices, 2 + mistakes]: tests, right answers, wrong answers of each class.
      (member, slice) -> the first ``samples`` answers: the parts of the prompt, and ``asked, answer, decoded, error``.
    """
    task = group.task
    counts: Any = 0
    shown: dict[tuple[int, int], list[Row]] = {}
    for piece in answers:
        members, tests = piece.index.shape
        flat = jax.tree.map(lambda leaf, n=members * tests: leaf.reshape(n, *leaf.shape[2:]), piece)
        kinds = task.classify(flat.rules, flat.input, flat.right, flat.decoded).reshape(members, tests)
        counted = (piece.index >= 0) & (piece.differs | (condition.prompt != "shuffled"))
        chosen = [task.slices[name](piece.facts, piece.relation) for name in slices_of(condition, task)]
        belongs = np.stack([each & counted for each in chosen], axis=1)
        of_kind = [(belongs & (kinds == kind)[:, None]).sum(-1) for kind in range(-1, len(task.mistakes))]
        counts = counts + np.stack([belongs.sum(-1), *of_kind], axis=-1)
        for row, column in np.ndindex(belongs.shape[:2]):
            there = shown.setdefault((row, column), [])
            for test in np.flatnonzero(belongs[row, column])[: samples - len(there)]:
                answer = jax.tree.map(lambda leaf, at=(row, test): leaf[at], piece)
                there.append(_sample(answer, kinds[row, test], condition, group.config))
    return np.asarray(counts), shown


def slices_of(condition: Condition, task: type[Task]) -> tuple[str, ...]:
    """The slices by which a condition's tests are counted."""
    return condition.slices or (task.headline,)


def _sample(answer: Answers, kind: int, condition: Condition, setting: TaskSetting) -> Row:
    """One answered test as text; ``asked`` is what the prompt showed if not the right instruction."""
    asked = {"rule": "", "blanked": "no rule"}
    if condition.prompt == "shuffled":
        asked["shuffled"] = setting.instruction_words(setting.words(answer.asked))
    return setting.words(answer.tokens) | {
        "asked": asked[condition.prompt],
        "decoded": setting.text(before_end(answer.decoded)),
        "error": "" if kind < 0 else setting.mistakes[kind],
    }


def error_rows(who: Row, task: type[Task], split: str, slice: str, counts: np.ndarray) -> list[Row]:
    """The rows of errors.csv for one member and slice; ``counts`` is a row of ``tally``'s counts."""
    tests, _, *wrong = map(int, counts)
    return [
        who | {"split": split, "slice": slice, "error": error, "count": count, "tests": tests}
        for error, count in zip(task.mistakes, wrong, strict=True)
    ]
