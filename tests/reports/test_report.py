"""The report shows the tables' contents, complete and escaped, without external resources; identical tables give
identical bytes. Its numbers are recomputed here, and its markup is parsed by ``html.parser``."""

import base64
import html.parser
import json
import math
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.fig2a_instruction_count import PRESETS
from instrdiv.analysis import thresholds
from instrdiv.analysis.claims import Claim
from instrdiv.config.layout import Options
from instrdiv.config.presets import Setting
from instrdiv.config.sweep import Sweep
from instrdiv.evaluation.rows import ERROR_COLUMNS, result_columns, sample_columns
from instrdiv.reports.curves import thin
from instrdiv.reports.report import SAMPLES, compare, write_report
from instrdiv.runs.saved import METRIC_COLUMNS, RunDirectory
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.files import write_json
from instrdiv.runtime.tables import read_table, write_table
from tests.worlds import TINY, tiny

LAPTOP = Path(__file__).parents[2] / "results" / "laptop" / "fig2a_instruction_count"
EVIL = "<script>alert(1)</script>&\"'"
VOID = {"meta", "img", "br", "wbr"}
ERRORS = ("wrong length", "wrong site", "wrong replacement", "copy error")


def make_run(directory, figure="fig", seeds=2, reports=5, diverged=(), **values):
    """Writes the tables of a made-up run. Exact match is I/100 + seed/1000 on unseen rules and 1 on seen ones; on
    unseen_dev it climbs to twice the former in equal increments every ten steps. Members whose (I, seed) is in
    ``diverged`` diverge at step 25."""
    base = tiny(epochs=10 * reports * TINY.batch_size / TINY.examples, reports=reports)
    sweep = Sweep.grid(base, seeds=seeds, figure=figure, **({"instructions": [4, 16, 60]} | values))
    metrics, results, resemblance = [], [], []
    for member in sweep.members:
        count = member.setting.instructions
        unseen = count / 100 + member.seed / 1000
        same = {"figure": figure, "group": "g0", "member": member.id, "seed": member.seed}
        ends = "diverged at step 25" if (count, member.seed) in diverged else "ok"
        for report in range(1, reports + 1):
            gone = ends != "ok" and report > 2
            metrics.append(same | {
                "step": 10 * report, "examples_seen": 80 * report, "loss": math.nan if gone else 3 / report,
                "gradient_norm": 1.0, "train_exact_match": 0.5, "unseen_dev_exact_match": 2 * unseen * report / reports,
                "unseen_dev_tests": 16, "status": ends if gone else "ok"})  # fmt: skip
        for split, right in (("unseen_dev", unseen), ("unseen", unseen), ("seen", 1.0)):
            results.append(same | member.setting.as_row() | {
                "step": 10 * reports, "examples_seen": 80 * reports, "split": split, "slice": "has_op",
                "exact_match": right, "tests": 1000, "status": ends, "examples_per_rule": 1.0, "exact_match_low": 0.0,
                "exact_match_high": 1.0})  # fmt: skip
        distances = {f"{what}_{of}": 1.5 for what in ("pattern", "replacement", "rule")
                     for of in ("seen", "distance_min", "distance_mean")}  # fmt: skip
        resemblance.append({"member": member.id, "trained": count, "held_out": 24, "compared": 16} | distances)
    begin(directory, sweep)
    write_table(directory / "metrics.csv", metrics, METRIC_COLUMNS)
    write_table(directory / "results.csv", results, result_columns(Setting))
    write_table(directory / "resemblance.csv", resemblance, tuple(resemblance[0]))
    shutil.copy(LAPTOP / "timings.csv", directory)
    write_json(directory / "provenance.json",
               {"command": [f"{figure}.py", "--preset=x"], "versions": {"python": "3", "jax": None},
                "devices": ["cpu"] * 4, "wall_seconds": 83.2, "commit": None})  # fmt: skip
    return sweep.members


def begin(directory, sweep):
    """Creates a run directory with its config.json."""
    with RunDirectory.begin(directory, sweep, Options(2, 1, 1), overwrite=False):
        pass


def add_answers(directory, members, samples=()):
    """Writes errors.csv and samples.csv. Of 1000 answers on unseen has-op tests, 10 * I are right and the wrong ones
    split 1 : 1 : 2 : rest; ``samples``, (pattern, replacement, input, answer, decoded, error), are those of every
    member."""
    errors, rows = [], []
    names = ("pattern", "replacement", "input", "answer", "decoded", "error")
    for member in members:
        same = {"member": member.id, "seed": member.seed, "step": 50, "slice": "has_op"}
        wrong = 1000 - 10 * member.setting.instructions
        counts = (wrong // 8, wrong // 8, wrong // 4, wrong - wrong // 2)
        for error, count in zip(ERRORS, counts, strict=True):
            errors.append(same | {"split": "unseen", "error": error, "count": count, "tests": 1000})
        for split in ("unseen", "seen"):
            rows += [same | {"split": split} | dict(zip(names, sample, strict=True)) for sample in samples]
    write_table(directory / "errors.csv", errors, tuple(errors[0]))
    if rows:
        write_table(directory / "samples.csv", rows, tuple(rows[0]))


class Page(html.parser.HTMLParser):
    """Strict parser of a page: tags must be closed in order, ids unique; keeps texts, attributes and tables."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.pieces = [], [], [], []
        self.tables, self.points = [], {}
        self.feed(text)
        self.close()
        assert not self.open and len(set(self.ids)) == len(self.ids)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        assert len(values) == len(attributes)
        self.tags.append((tag, values))
        self.ids += [values["id"]] if "id" in values else []
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert "svg" in self.open, f"<{tag}/> is not valid HTML"
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.pieces.append(data)
        if "table" in self.open and self.tables[-1] and self.tables[-1][-1]:
            self.tables[-1][-1][-1] += data

    @property
    def text(self):
        return " ".join("".join(self.pieces).split())

    def table(self, *heads):
        """Rows of the first table whose header contains these words, cells stripped."""
        for table in self.tables:
            if all(any(head in cell for cell in table[0]) for head in heads):
                return [[" ".join(cell.split()) for cell in row] for row in table[1:]]
        raise AssertionError(f"no table with {heads}")

    def all(self, tag):
        return [values for name, values in self.tags if name == tag]


def page(directory, *arguments, **options):
    return Page(write_report(directory, *arguments, **options).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def laptop(tmp_path_factory):
    """A copy of the laptop run of figure 2a, and its page."""
    directory = tmp_path_factory.mktemp("report") / "run"
    preset = PRESETS["laptop"]
    begin(
        directory, Sweep.grid(preset.base, preset.seeds, LAPTOP.name, preset.dev_tests, preset.tests, **preset.values)
    )
    for file in LAPTOP.iterdir():
        if file.name != "config.json":
            shutil.copy(file, directory)
    claims = thresholds.instruction_step_claims(read_table(directory / "results.csv"))
    return directory, page(directory, claims)


SAMPLE = ("nan", "inf", "xxnanx", "xxinfx", "xxixx", "wrong length")


class TestARealRun:
    def test_says_the_verdict_with_its_evidence_and_the_threshold(self, laptop):
        results = read_table(LAPTOP / "results.csv")
        for claim in thresholds.instruction_step_claims(results):
            assert claim.text in laptop[1].text and claim.evidence in laptop[1].text
        assert "reproduced" in laptop[1].pieces and "not reproduced" not in laptop[1].text

    def test_shows_the_picture_itself(self, laptop):
        (picture,) = laptop[1].all("img")
        found = thresholds.threshold(thresholds.select(read_table(LAPTOP / "results.csv"), "unseen", "has_op"))
        assert (
            base64.b64decode(picture["src"].removeprefix("data:image/png;base64,"))
            == (LAPTOP / "figure.png").read_bytes()
        )
        assert found.text in picture["alt"]

    def test_has_one_line_a_model_in_two_panels_a_setting(self, laptop):
        assert len(laptop[1].all("polyline")) == 2 * 24 and len(laptop[1].all("h3")) == 8 + 2

    def test_says_what_was_asked_and_where_it_came_from(self, laptop):
        facts = json.loads((LAPTOP / "provenance.json").read_text())
        jax = f"jax {facts['versions']['jax']},"
        for part in ("24 models: 8 settings and 3 seeds", "16 · 64 · 128", "2 × cpu", jax, facts["commit"]):
            assert part in laptop[1].text
        flags = " ".join(facts["command"][1:])
        assert f"python -m experiments.fig2a_instruction_count {flags}" in laptop[1].pieces

    def test_needs_nothing_else_and_runs_nothing(self, laptop):
        text = (laptop[0] / "report.html").read_text()
        assert not re.search(r"https?:|url\(|@import|<link|<script|javascript:|\son\w+=", text)
        assert all(values.get("src", "data:").startswith("data:") for _, values in laptop[1].tags)

    def test_has_one_main_heading_and_names_every_picture(self, laptop):
        assert len(laptop[1].all("h1")) == 1 and len(laptop[1].all("main")) == 1
        for drawing in laptop[1].all("svg"):
            assert drawing.get("aria-label") or drawing.get("aria-hidden") == "true"
        for values in laptop[1].all("section"):
            assert values["aria-labelledby"] in laptop[1].ids


class TestTables:
    def test_results_are_mean_least_and_greatest_over_seeds(self, tmp_path):
        make_run(tmp_path / "run")
        assert page(tmp_path / "run").table("unseen rules", "diverged") == [
            ["4", "0.041 0.040–0.041", "1.000 1.000–1.000", "2", "none"],
            ["16", "0.161 0.160–0.161", "1.000 1.000–1.000", "2", "none"],
            ["60", "0.601 0.600–0.601", "1.000 1.000–1.000", "2", "none"],
        ]

    def test_other_tests_are_means_over_seeds(self, tmp_path):
        make_run(tmp_path)
        rows = read_table(tmp_path / "results.csv")
        others = [r | {"slice": "no_op/near_miss", "exact_match": (r["instructions"] + 2 * r["seed"]) / 100}
                  for r in rows if r["split"] == "unseen" and r["instructions"] < 60]  # fmt: skip
        write_table(tmp_path / "results.csv", rows + others, result_columns(Setting))
        rows = page(tmp_path).table("no_op/near_miss")
        assert [row[-1] for row in rows] == ["0.050", "0.170", "–"]

    def test_the_numbers_of_the_picture_are_shown(self, tmp_path):
        make_run(tmp_path)
        assert "Numbers in the figure" not in page(tmp_path).text
        row = {"factor": EVIL, "i50": 189.123456, "ratio": math.nan, "seeds": 3}
        write_table(tmp_path / "figure.csv", [row], list(row))
        assert page(tmp_path).table("factor", "i50") == [[EVIL, "189.1", "–", "3"]]

    def test_a_diverged_member_is_said_and_left_out(self, tmp_path):
        members = make_run(tmp_path / "run", diverged=[(16, 1), (60, 0), (60, 1)])
        add_answers(tmp_path / "run", members)
        shown = page(tmp_path / "run")
        rows = shown.table("unseen rules", "diverged")
        assert rows[1][1:] == ["0.160 0.160–0.160", "1.000 1.000–1.000", "2", "seed 1 at step 25"]
        assert rows[2][1:] == ["–", "–", "2", "seed 0 at step 25, seed 1 at step 25"]
        assert len([values for values in shown.all("path") if values["class"] == "cross"]) == 2 * 3
        assert [row[0] for row in shown.table("copy error")] == ["4", "16"]

    def test_error_classes_are_shares_of_all_answers(self, tmp_path):
        members = make_run(tmp_path / "run")
        add_answers(tmp_path / "run", members)
        shown = page(tmp_path / "run")
        assert shown.table(*ERRORS)[1] == ["16", "", "16.0 %", "10.5 %", "10.5 %", "21.0 %", "42.0 %"]
        widths = [float(values["width"]) for values in shown.all("rect") if "class" in values]
        assert sum(widths[5:10]) == pytest.approx(100, abs=0.05) and widths[5:7] == [16, 10.5]

    def test_files_that_a_run_may_lack_leave_out_their_section(self, tmp_path):
        make_run(tmp_path / "run")
        shown = page(tmp_path / "run")
        assert not shown.all("img") and not {"errors", "samples"} & set(shown.ids)
        assert {"asked", "verdict", "results", "curves", "resemblance", "provenance"} <= set(shown.ids)

    def test_tables_of_errors_and_samples_may_be_empty(self, tmp_path):
        make_run(tmp_path / "run")
        write_table(tmp_path / "run" / "errors.csv", [], ERROR_COLUMNS)
        write_table(tmp_path / "run" / "samples.csv", [], sample_columns(Setting))
        assert not {"errors", "samples"} & set(page(tmp_path / "run").ids)

    def test_tests_of_earlier_steps_are_left_out(self, tmp_path):
        add_answers(tmp_path / "run", make_run(tmp_path / "run"), [SAMPLE])
        before = write_report(tmp_path / "run").read_bytes()
        for name in ("results", "errors", "samples"):
            path = tmp_path / "run" / f"{name}.csv"
            rows = read_table(path, text=("pattern", "replacement"))
            early = [row | {"step": 20, "exact_match": 0.9, "count": 1000, "status": "ok"} for row in rows]
            write_table(path, early + rows, tuple(rows[0]))
        assert write_report(tmp_path / "run").read_bytes() == before

    def test_several_settings_vary_each_with_its_own_threshold(self, tmp_path):
        make_run(tmp_path / "run", width=[16, 32])
        shown = page(tmp_path / "run")
        assert [row[:2] for row in shown.table("unseen rules")] == [
            [i, w] for i in ("4", "16", "60") for w in ("16", "32")
        ]
        assert all(f"width = {width}: Threshold I50 = " in shown.text for width in (16, 32))

    def test_without_instructions_varying_there_is_no_threshold(self, tmp_path):
        make_run(tmp_path / "run", instructions=[16], input_length=[6, 5])
        shown = page(tmp_path / "run")
        assert [row[0] for row in shown.table("unseen rules")] == ["5", "6"] and "threshold" not in shown.text.lower()

    def test_one_member_has_a_report(self, tmp_path):
        make_run(tmp_path / "run", seeds=1, instructions=[60])
        assert "1 model: 1 setting and 1 seed," in page(tmp_path / "run").text

    def test_a_run_that_is_not_judged_says_so(self, tmp_path):
        make_run(tmp_path / "run")
        assert "not judged" in page(tmp_path / "run").text
        assert "not judged" not in page(tmp_path / "run", [Claim("it works", False, "no")]).text


class TestCurves:
    def test_onset_is_the_first_report_past_one_half_as_a_ring_and_a_number(self, tmp_path):
        """2 * 0.6 * report / 5 exceeds one half at the third report, step 30; the other members never do."""
        make_run(tmp_path / "run")
        shown = page(tmp_path / "run")
        assert shown.text.count("seed 0: never") == 2 and shown.text.count("seed 0: 30") == 1
        rings = shown.all("circle")
        assert len(rings) == 2
        ring, other = ((float(values["cx"]), float(values["cy"])) for values in rings)
        line = [values["points"].split()[2] for values in shown.all("polyline")]
        assert f"{ring[0]},{ring[1]}" in line and f"{other[0]},{other[1]}" in line

    def test_a_curve_ends_where_its_member_diverged(self, tmp_path):
        make_run(tmp_path / "run", seeds=1, instructions=[60], diverged=[(60, 0)])
        shown = page(tmp_path / "run")
        for line, cross in zip(shown.all("polyline"), shown.all("path"), strict=False):
            assert len(line["points"].split()) == 2 and cross
        assert "diverged at 25" in shown.text

    def test_48_members_with_1000_reports_stay_small(self, tmp_path):
        make_run(tmp_path / "run", seeds=16, reports=1000)
        path = write_report(tmp_path / "run")
        assert path.stat().st_size < 1_000_000
        lines = Page(path.read_text()).all("polyline")
        assert len(lines) == 2 * 48 and max(len(line["points"].split()) for line in lines) < 200

    @given(st.lists(st.floats(-10, 10), min_size=1, max_size=200), st.integers(6, 60))
    def test_thinning_keeps_ends_order_and_extremes(self, values, most):
        points = list(enumerate(values))
        kept = thin(points, most)
        assert len(kept) <= most and set(kept) <= set(points) and kept == sorted(kept)
        assert kept[0] == points[0] and kept[-1] == points[-1]
        assert max(y for _, y in kept) == max(values) and min(y for _, y in kept) == min(values)


class TestAnswers:
    def test_rules_that_read_like_numbers_are_shown_as_they_are(self, tmp_path):
        members = make_run(tmp_path / "run")
        add_answers(
            tmp_path / "run",
            members,
            [SAMPLE, ("ab", "", "xab", "x", "x", ""), ("ab", "c", "x", "x", "", "copy error")],
        )
        rows = page(tmp_path / "run").table("rule", "decoded")
        assert rows[0] == ["nan → inf", "xxnanx", "xxinfx", "xxinfxx", "wrong length", "unseen", "0"]
        assert rows[1] == ["ab → (nothing)", "xab", "x", "x", "none", "unseen", "0"] and rows[2][3] == "x"

    def test_the_occurrence_the_wrong_and_the_missing_letters_are_marked(self, tmp_path):
        members = make_run(tmp_path / "run", seeds=1, instructions=[16])
        add_answers(
            tmp_path / "run",
            members,
            [
                ("ab", "cd", "xabab", "xcdab", "xcqab", "wrong replacement"),
                ("ab", "cd", "ab", "cd", "c", "wrong length"),
            ],
        )
        text = write_report(tmp_path / "run").read_text()
        assert (
            'x<span class="site">ab</span>ab</td>' in text
            and "xc<mark>q</mark>ab</td>" in text
            and "c<del>d</del></td>" in text
        )

    def test_the_first_ones_of_each_split_are_shown(self, tmp_path):
        members = make_run(tmp_path / "run", seeds=1, instructions=[16])
        add_answers(tmp_path / "run", members, [SAMPLE] * (SAMPLES + 3))
        shown = page(tmp_path / "run")
        splits = [row[5] for row in shown.table("rule", "decoded")]
        assert splits == ["unseen"] * SAMPLES + ["seen"] * SAMPLES
        assert f"0 of {2 * SAMPLES} right; {2 * SAMPLES + 6} in the table" in shown.text

    @given(st.text("abc", max_size=12), st.text("abc", max_size=12))
    def test_pieces_make_up_what_was_decoded(self, answer, decoded):
        pieces = compare(answer, decoded)
        assert "".join(letters for kind, letters in pieces if kind != "missing") == decoded
        assert (answer == decoded) == all(kind == "same" for kind, _ in pieces)
        rest = iter(answer)  # same and missing pieces occur in the answer in this order
        assert all(letter in rest for kind, letters in pieces if kind != "wrong" for letter in letters)


class TestEscaping:
    def test_names_commands_and_answers_come_out_as_text(self, tmp_path):
        members = make_run(tmp_path / EVIL.replace("/", "_"), figure=EVIL)
        run_dir = tmp_path / EVIL.replace("/", "_")
        add_answers(run_dir, members, [(EVIL,) * 5 + (EVIL,)])
        facts = json.loads((run_dir / "provenance.json").read_text())
        write_json(run_dir / "provenance.json", facts | {"devices": [EVIL], "commit": EVIL, "versions": {EVIL: EVIL}})
        shown = page(run_dir, [Claim(EVIL, True, EVIL)])
        assert not shown.all("script") and shown.text.count(EVIL) > 12
        assert page(run_dir, command=f"python {EVIL}").pieces.count(f"python {EVIL}") == 1


class TestFiles:
    def test_the_same_tables_give_the_same_bytes_wherever_they_lie_and_nothing_else_changes(self, tmp_path, laptop):
        shutil.copytree(laptop[0], tmp_path / "elsewhere")
        before = {path.name: path.read_bytes() for path in (tmp_path / "elsewhere").iterdir()}
        claims = thresholds.instruction_step_claims(read_table(LAPTOP / "results.csv"))
        write_report(tmp_path / "elsewhere", claims)
        assert {path.name: path.read_bytes() for path in (tmp_path / "elsewhere").iterdir()} == before

    @pytest.mark.parametrize(
        "name", ["config.json", "provenance.json", "results.csv", "metrics.csv", "timings.csv", "resemblance.csv"]
    )
    @pytest.mark.parametrize("damage", [None, "", "{", "a,b\n1,2\n", "[]", "member\n"])
    def test_a_missing_or_damaged_file_is_one_line_that_names_it(self, tmp_path, name, damage):
        make_run(tmp_path / "run")
        (tmp_path / "run" / name).unlink()
        if damage is not None:
            (tmp_path / "run" / name).write_text(damage)
        with pytest.raises(BadInput, match=re.escape(name)) as refusal:
            write_report(tmp_path / "run")
        assert "\n" not in str(refusal.value) and not (tmp_path / "run" / "report.html").exists()

    def test_tables_of_another_run_are_refused(self, tmp_path):
        make_run(tmp_path / "run")
        make_run(tmp_path / "other", instructions=[5])
        shutil.copy(tmp_path / "other" / "metrics.csv", tmp_path / "run")
        with pytest.raises(BadInput, match=r"metrics\.csv names the member m\w+, which config\.json lacks"):
            write_report(tmp_path / "run")

    def test_a_table_cut_short_is_refused(self, tmp_path):
        make_run(tmp_path / "run")
        path = tmp_path / "run" / "metrics.csv"
        path.write_text(path.read_text()[:-30])
        with pytest.raises(BadInput, match=r"metrics\.csv cannot be read as a table: its rows differ in length"):
            write_report(tmp_path / "run")

    def test_a_run_made_from_python_has_no_command(self, tmp_path):
        make_run(tmp_path / "run")
        facts = json.loads((tmp_path / "run" / "provenance.json").read_text())
        write_json(tmp_path / "run" / "provenance.json", facts | {"command": ["kernel.py", "-f", "x.json"]})
        assert "made from Python" in page(tmp_path / "run").text
