"""How the adapters of a run are tested: by their answers, or by their loss on held-out rows.

Each kind of test has ``are_done`` (whether a directory's tables already contain these tests), ``ask_base`` (called
before the members are trained) and ``ask_members`` (called afterward), which makes the tables of the run, results.csv
last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from instrdiv.data.mixing import MixedData
from instrdiv.data.schemas import TextRow
from instrdiv.data.templates import Template
from instrdiv.data.tokenizer import Tokenizer
from instrdiv.evaluation.adapter_rows import (
    ANSWER_COLUMNS,
    BASE_COLUMNS,
    BASE_LOSS_COLUMNS,
    IDENTITY,
    INTERVAL,
    LOSS_IDENTITY,
    answer_rows,
    sample_rows,
    score,
    with_settings,
)
from instrdiv.evaluation.answers import answers
from instrdiv.evaluation.losses import held_out_losses
from instrdiv.runs.finetune import FineTuned, data_digest
from instrdiv.runtime.tables import Row, Table, read_table
from instrdiv.training.adapter_trainer import Job, Population, place_population
from instrdiv.training.recipe import AdapterMember

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class AnswerTests:
    """Prompts whose greedily decoded answers are right or wrong.

    Attributes:
      figure: name for the tables.
      splits: the splits in the order tested; the last one is ``unseen``.
      tests: number of ``unseen`` tests per member.
      of_member: (member, split) -> its tests; the same number for all members. Called once per key.
      key: (member, split) -> key; members with the same key share their tests.
      of_base: makes the tests of the base, split -> tests; called once.
      slices: see ``score``.
      tokenizer, template: turn a test into a prompt.
    """

    figure: str
    splits: Sequence[str]
    tests: int
    of_member: Callable[[AdapterMember, str], list[TextRow]]
    key: Callable[[AdapterMember, str], object]
    of_base: Callable[[], Mapping[str, list[TextRow]]]
    slices: Mapping[str, Callable[[TextRow], bool]]
    tokenizer: Tokenizer
    template: Template

    def are_done(self, run_dir: Path, members: Sequence[AdapterMember], step: int) -> bool:
        """Whether results.csv has exactly these members at this step, with this number of tests."""
        if not (run_dir / "results.csv").exists():
            return False
        rows = read_table(run_dir / "results.csv", IDENTITY)
        found = {(r["member"], r["step"], r["tests"]) for r in rows if (r["split"], r["slice"]) == ("unseen", "all")}
        return found == {(member.id, step, self.tests) for member in members}

    def ask_base(self, job: Job, say: Say) -> None:
        """Does nothing: the base is tested together with the members."""

    def ask_members(self, job: Job, tuned: FineTuned, of_base: None, say: Say) -> dict[str, Table]:
        """Returns base.csv, samples.csv and results.csv."""
        recipe, results, base, samples = job.recipe, list[Row](), list[Row](), list[Row]()
        status = {row["member"]: row["status"] for row in tuned.metrics}
        population = place_population(tuned.population(job.model.config), job.mesh)
        for split in self.splits:
            say(f"testing {split}")
            made: dict[object, list[TextRow]] = {}
            for member in tuned.members:
                key = self.key(member, split)
                if key not in made:
                    made[key] = self.of_member(member, split)
            texts = [made[self.key(member, split)] for member in tuned.members]
            for member, asked, given in zip(tuned.members, texts, self._ask(job, texts, population), strict=True):
                scores = score(asked, given, self.slices)
                results += answer_rows(
                    self.figure, member, recipe.steps, recipe.batch_size, split, scores, status[member.id]
                )
                samples += sample_rows(self.figure, member.id, member.seed, recipe.steps, split, asked, given)
        say("testing the base")
        for split, asked in self.of_base().items():
            (given,) = self._ask(job, [asked])
            for slice, (right, total) in score(asked, given, self.slices).items():
                base.append({"split": split, "slice": slice, "exact_match": right / total, "tests": total})
            samples += sample_rows(self.figure, "base", 0, 0, split, asked, given)
        return {
            "base.csv": Table(BASE_COLUMNS, base),
            "samples.csv": Table(ANSWER_COLUMNS, samples),
            "results.csv": with_settings(results, IDENTITY, INTERVAL),
        }

    def _ask(
        self, job: Job, texts: Sequence[Sequence[TextRow]], population: Population | None = None
    ) -> list[list[str]]:
        longest = max(len(self.tokenizer.encode(text.response)) for text in texts[0]) + 1  # plus the end token
        precision = job.recipe.precision
        return answers(
            job.model, self.tokenizer, self.template, texts, longest, job.mesh, population, precision=precision
        )


@dataclasses.dataclass(frozen=True)
class HeldOutTests:
    """The loss on the held-out rows of every source, first for the base, then for the members.

    Attributes:
      figure: name for the tables.
      data: the members' training data and held-out rows.
    """

    figure: str
    data: MixedData

    def are_done(self, run_dir: Path, members: Sequence[AdapterMember], step: int) -> bool:
        """Whether the tables have exactly these members at this step, on these held-out rows."""
        if not (run_dir / "results.csv").exists():
            return False
        results, base = read_losses(run_dir)
        wanted = {(member.id, step, name) for member in members for name in self.data.held_out.source_names}
        return wanted == {(row["member"], row["step"], row["source"]) for row in results} and {
            str(row["data"]) for row in base
        } == {data_digest(self.data.held_out)}

    def ask_base(self, job: Job, say: Say) -> list[Row]:
        """Returns the rows of base.csv. High losses on all sources suggest the wrong template or tokenizer."""
        say("testing the base on held-out rows")
        (losses,), tokens = held_out_losses(job.model, self.data.held_out, job.recipe, job.mesh)
        names, digest = self.data.held_out.source_names, data_digest(self.data.held_out)
        rows = [
            dict(zip(BASE_LOSS_COLUMNS, (name, loss, count, digest), strict=True))
            for name, loss, count in zip(names, losses.tolist(), tokens.tolist(), strict=True)
        ]
        listed = ", ".join(f"{row['source']} {row['loss']:.4f} ({row['tokens']:,} tokens)" for row in rows)
        print(f"held-out loss of the base, nats per token: {listed}", flush=True)
        return rows

    def ask_members(self, job: Job, tuned: FineTuned, of_base: Sequence[Row], say: Say) -> dict[str, Table]:
        """Returns the tables of ``MixedData.tables``, base.csv and results.csv."""
        say("testing the adapters on held-out rows")
        population = place_population(tuned.population(job.model.config), job.mesh)
        losses, _ = held_out_losses(job.model, self.data.held_out, job.recipe, job.mesh, population)
        status = {row["member"]: row["status"] for row in tuned.metrics}
        steps, seen, rows = job.recipe.steps, job.recipe.steps * job.recipe.batch_size, []
        for member, of_member, epochs in zip(tuned.members, losses.tolist(), self.data.epochs(seen), strict=True):
            for base, loss in zip(of_base, of_member, strict=True):
                cells = (self.figure, member.id, member.seed, steps, seen, epochs, base["source"], loss,
                         base["loss"] - loss, base["tokens"], status[member.id])  # fmt: skip
                rows.append(dict(zip(LOSS_IDENTITY, cells, strict=True)) | member.as_row())
        return {
            **self.data.tables([(member.id, member.seed) for member in tuned.members], seen),
            "base.csv": Table(BASE_LOSS_COLUMNS, of_base),
            "results.csv": with_settings(rows, LOSS_IDENTITY),
        }


#: Columns of the mixture tables that are read as text, because a source may be named 7.
MIXTURE_TEXTS = ("source", "mixture", "reason", "example", "example_like", "example_matched", "data", "where")


def read_answers(run_dir: Path) -> tuple[list[Row], list[Row]]:
    """results.csv and base.csv of ``AnswerTests``. Raises BadInput if one is missing or damaged."""
    return read_table(run_dir / "results.csv", IDENTITY), read_table(run_dir / "base.csv", BASE_COLUMNS)


def read_losses(run_dir: Path) -> tuple[list[Row], list[Row]]:
    """results.csv and base.csv of ``HeldOutTests``. Raises BadInput if one is missing or damaged."""
    results = read_table(run_dir / "results.csv", (*LOSS_IDENTITY, "mixture"), MIXTURE_TEXTS)
    return results, read_table(run_dir / "base.csv", BASE_LOSS_COLUMNS, MIXTURE_TEXTS)
