"""A figure of fine-tuning is one short file: its presets, members with their data, tests, picture and claims."""

import dataclasses

import pytest

from instrdiv.analysis.claims import Claim, read_claims
from instrdiv.data.packing import pack, tokenize
from instrdiv.data.schemas import TextRow
from instrdiv.data.templates import make_template
from instrdiv.launch.finetuning import FineTuningFigure, Preset, Study, Trained, Tuning, launch_finetuning
from instrdiv.models.lora import Lora
from instrdiv.runs.adapter_tests import AnswerTests
from instrdiv.runtime.fields import at_least, field
from instrdiv.runtime.tables import read_table
from instrdiv.tasks.encrypted import EncryptedSetting
from instrdiv.training.pretraining import SmallBase
from instrdiv.training.recipe import Recipe

LETTERS = "abcdef"
RECIPE = Recipe(steps=2, batch_size=4, precision="float32", reports=1)
BASE = SmallBase(layers=1, width=16, heads=2, mlp_width=16, instructions=4, examples=16, recipe=RECIPE)


@dataclasses.dataclass(frozen=True)
class Copying:
    instructions: int = field(2, "letters that are copied", bound=at_least(1))
    length: int = field(2, "of a string", bound=at_least(1))

    def rows(self):
        return [TextRow(f"Key:{letter * self.length}\nAnswer:", letter, "copy", letter) for letter in LETTERS]


def study(asked):
    members = [
        asked.member(dataclasses.asdict(setting), seed) for setting in asked.settings for seed in range(asked.seeds)
    ]

    def make(tokenizer, say):
        template = make_template("plain", tokenizer)

        def packed(member):
            rows = Copying(**member.setting).rows()[: member.setting["instructions"]]
            return pack(tokenize(rows, template, tokenizer), 8, tokenizer.pad_id, several=False)[0]

        tests = AnswerTests(
            figure="copying",
            splits=("unseen",),
            tests=asked.tests,
            of_member=lambda member, split: Copying(**member.setting).rows()[-asked.tests :],
            key=lambda member, split: (),
            of_base=lambda: {"unseen": asked.settings[0].rows()[-asked.tests :]},
            slices={"of_f": lambda row: row.response == "f"},
            tokenizer=tokenizer,
            template=template,
        )
        return Trained(members, [packed(member) for member in members], asked.tuning.recipe, tests, "letters")

    return Study(make, EncryptedSetting(alphabet_size=6, pattern_length=2, input_length=4, separator="none"))


def draw(results, base, path_stem):
    path_stem.with_suffix(".png").write_bytes(b"a picture")


def claims(results):
    return [Claim("there is a member for each", len({row["member"] for row in results}) == 2, f"{len(results)} rows")]


FIGURE = FineTuningFigure(
    "copying",
    {"laptop": Preset(Copying(), {"instructions": (1, 3)}, seeds=1, tests=2,
                      tuning=Tuning(Lora(2, 2.0), 1e-2, RECIPE, BASE))},
    study,
    draw,
    claims,
    aliases=("length",),
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("copying") / "run"
    assert launch_finetuning(FIGURE, [f"--run_dir={run_dir}", "--devices=2"]) == 0
    return run_dir


def test_it_is_trained_tested_drawn_and_judged(finished):
    results = read_table(finished / "results.csv")
    assert [(row["instructions"], row["slice"], row["tests"]) for row in results] == [
        (1, "all", 2), (1, "of_f", 1), (3, "all", 2), (3, "of_f", 1)
    ]  # fmt: skip
    assert {row["split"] for row in read_table(finished / "base.csv")} == {"unseen"}
    assert len(read_table(finished / "samples.csv")) == 6
    assert read_claims(finished / "claims.csv") == [Claim("there is a member for each", True, "4 rows")]
    assert (finished / "figure.png").exists() and "copying" in (finished / "report.html").read_text()


def test_the_same_again_reads_back_and_another_is_refused(finished, capsys):
    before = {path: path.read_bytes() for path in finished.glob("*.csv") if path.stem != "timings"}
    assert launch_finetuning(FIGURE, [f"--run_dir={finished}", "--devices=2"]) == 0
    said = capsys.readouterr()
    assert (
        "already finished; loading its results" in said.err
        and "verdict: reproduced" in said.out
        and "letters" in said.out
    )
    for flag in ("--length=3", "--config.length=3"):
        assert launch_finetuning(FIGURE, [f"--run_dir={finished}", "--devices=2", flag]) == 2
        assert "already contains a different run (member 0.data" in capsys.readouterr().err.splitlines()[-1]
    assert {path: path.read_bytes() for path in finished.glob("*.csv") if path.stem != "timings"} == before


def test_what_is_not_the_presets_own_is_not_judged(finished, tmp_path, capsys):
    assert launch_finetuning(FIGURE, [f"--run_dir={tmp_path / 'run'}", "--config.length=1", "--devices=2"]) == 0
    assert "Not judged: claims apply only to the unmodified preset." in capsys.readouterr().out
    assert not (tmp_path / "run" / "claims.csv").exists()
