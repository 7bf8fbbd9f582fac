"""The index shows the outcome of every figure, complete and escaped; its links point to files that exist."""

import json
import shutil
from urllib.parse import unquote

import pytest

from instrdiv.analysis.claims import Claim, write_claims
from instrdiv.reports.index import LAST_LINES, log_of, read_entry, write_index, write_log
from instrdiv.reports.report import write_report
from instrdiv.runtime.files import write_json
from tests.reports.test_report import EVIL, Page, make_run

CLAIMS = [Claim("few do not", True, "0.040"), Claim("many do", True, "0.600")]
QUESTIONS = {
    "borne_out": "Figure 1: is it so?",
    "not_borne_out": "Figure 2: is it so, too?",
    "too_small": "Figure 3: who knows?",
    "broken": "Figure 4: what if it fails?",
    "begun": "Figure 5: what if it is stopped?",
    "missing": "Figure 6: what if it was never run?",
}


def finish(run_dir, claims):
    """Adds the files that a launcher writes at the end of a run."""
    (run_dir / "figure.png").write_bytes(b"PNG")
    write_claims(run_dir / "claims.csv", claims)
    write_report(run_dir, claims)


@pytest.fixture
def directory(tmp_path):
    make_run(tmp_path / "borne_out", "borne_out")
    finish(tmp_path / "borne_out", CLAIMS)
    make_run(tmp_path / "not_borne_out", "not_borne_out", width=[16, 32])
    finish(tmp_path / "not_borne_out", [CLAIMS[0], Claim("many do", False, "0.600")])
    make_run(tmp_path / "too_small", "too_small", instructions=[4, 16])
    finish(tmp_path / "too_small", None)
    write_log(tmp_path, "broken", "python -m broken", [*map(str, range(50)), "MemoryError", "exit status 1"])
    make_run(tmp_path / "begun", "begun")
    return tmp_path


def entries(directory):
    return [read_entry(directory, name, question) for name, question in QUESTIONS.items()]


def cards(page):
    """Texts of the page's cards, in order."""
    _, *rest = page.text.split("Figure ")
    return rest


class TestEntries:
    def test_say_what_became_of_each(self, directory):
        assert [(entry.status, entry.verdict) for entry in entries(directory)] == [
            ("done", "reproduced"),
            ("done", "not reproduced"),
            ("done", "not judged"),
            ("failed", "failed"),
            ("not finished", "not finished"),
            ("not run", "not run"),
        ]

    def test_have_the_threshold_or_the_range_of_several(self, directory):
        one, several, outside, *rest = entries(directory)
        (_, found), _ = one.found[0], [found for _, found in several.found]
        assert one.i50 == f"{found.interval.mean:,.0f}" and 16 < found.interval.mean < 60
        assert [label for label, _ in several.found] == ["width\u00a0=\u00a016", "width\u00a0=\u00a032"]
        assert several.i50 == one.i50  # width changes nothing in these tables
        assert len(outside.found) == 1 and [entry.i50 for entry in (outside, *rest)] == [""] * 4

    def test_add_up_the_time_of_all_launches_that_said_one(self, directory):
        path = directory / "borne_out" / "provenance.json"
        assert entries(directory)[0].wall_time == "0:01:23"
        earlier = [{"wall_seconds": 3600.0}, {"command": ["killed"]}]
        write_json(path, json.loads(path.read_text()) | {"earlier_launches": earlier})
        assert entries(directory)[0].wall_time == "1:01:23"

    def test_a_failure_outweighs_what_an_earlier_launch_left(self, directory):
        write_log(directory, "borne_out", "python -m again", ["no space", "exit status 2"])
        entry = entries(directory)[0]
        assert (entry.verdict, entry.command, list(entry.last_lines)) == (
            "failed",
            "python -m again",
            ["no space", "exit status 2"],
        )
        log_of(directory, "borne_out").unlink()
        assert entries(directory)[0].verdict == "reproduced"

    @pytest.mark.parametrize("name", ["provenance.json", "results.csv", "claims.csv"])
    def test_a_run_that_cannot_be_read_has_failed_and_says_why(self, directory, name):
        (directory / "borne_out" / name).write_text("nonsense\n")
        entry, other, *_ = entries(directory)
        assert entry.status == "failed" and name in entry.last_lines[-1] and other.status == "done"
        page = Page(write_index(directory, QUESTIONS).read_text())
        assert "cannot be read" in cards(page)[0] and name in cards(page)[0]

    @pytest.mark.parametrize(
        "name, old, new",
        [("results.csv", "layers", "layres"), ("provenance.json", '"command": [', '"command": [], "was": [')],
    )
    def test_a_run_of_another_version_does_not_hide_the_others(self, directory, name, old, new):
        path = directory / "borne_out" / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))
        entry, other, *_ = entries(directory)
        assert entry.status == "failed" and "cannot be read" in entry.last_lines[-1] and other.status == "done"
        assert len(cards(Page(write_index(directory, QUESTIONS).read_text()))) == len(QUESTIONS)

    def test_an_empty_log_is_a_failure(self, directory):
        (directory / "borne_out.log").write_bytes(b"")
        assert entries(directory)[0].status == "failed"


class TestPage:
    def test_has_a_card_a_figure_with_what_became_of_it(self, directory):
        page = Page(write_index(directory, QUESTIONS).read_text())
        found = cards(page)
        for text, (name, question) in zip(found, QUESTIONS.items(), strict=True):
            assert text.startswith(f"{question.removeprefix('Figure ')} {name} ")
        one, two, three, four, five, six = found
        assert "reproduced ✓few do not 0.040 ✓many do 0.600" in one and "I50 = " in one
        assert "not reproduced ✓few do not 0.040 ✗many do 0.600" in two and "2 thresholds" in two
        assert "not judged" in three and "✓" not in three
        assert "failed" in four and "MemoryError exit status 1" in four and " 40 41 42 " in four
        assert LAST_LINES == 12 and " 39 " not in four and "python -m broken" in four
        assert "not finished" in five and "not run" in six
        assert "python -m experiments.borne_out --preset=x" in one
        assert (
            "6 figures: 1 reproduced, 1 not reproduced, 1 not judged, 1 failed, 1 not finished, 1 not run" in page.text
        )

    def test_has_a_row_a_figure(self, directory):
        rows = Page(write_index(directory, QUESTIONS).read_text()).table("figure", "verdict")
        i50 = entries(directory)[0].i50
        assert rows[0] == ["borne_out", "reproduced", i50, "0:01:23"]
        assert [row[0] for row in rows] == list(QUESTIONS) and rows[5][1:] == ["not run", "–", "–"]

    def test_links_lead_to_files_and_cards_that_are_there(self, directory):
        page = Page(write_index(directory, QUESTIONS).read_text())
        targets = [a["href"] for a in page.all("a")] + [img["src"] for img in page.all("img")]
        files = {unquote(target) for target in targets if not target.startswith("#")}
        assert all((directory / file).is_file() for file in files)
        for name in ("borne_out", "not_borne_out", "too_small"):
            assert {f"{name}/{file}" for file in ("report.html", "figure.png", "results.csv")} <= files
        assert "broken.log" in files and not any("missing" in file for file in files)
        anchors = {unquote(target[1:]) for target in targets if target.startswith("#")}
        assert anchors == set(QUESTIONS) and anchors <= set(page.ids)

    def test_hostile_names_and_texts_come_out_as_text(self, directory):
        name = EVIL.replace("/", "_")
        make_run(directory / name, name)
        finish(directory / name, [Claim(EVIL, True, EVIL)])
        write_log(directory, "broken", EVIL, [EVIL])
        page = Page(write_index(directory, {name: EVIL, "broken": EVIL}).read_text())
        assert not page.all("script") and page.text.count(EVIL) == 6 and page.text.count(name) >= 2
        assert all((directory / unquote(img["src"])).is_file() for img in page.all("img"))

    def test_needs_nothing_but_its_pictures_and_runs_nothing(self, directory):
        page = Page(write_index(directory, QUESTIONS).read_text())
        (policy,) = (tag["content"] for tag in page.all("meta") if "http-equiv" in tag)
        assert policy.startswith("default-src 'none'; img-src 'self' file:;")
        assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
        assert not any(name.startswith("on") for _, values in page.tags for name in values)

    def test_the_same_files_give_the_same_bytes_wherever_they_lie(self, directory, tmp_path_factory):
        written = write_index(directory, QUESTIONS).read_bytes()
        other = tmp_path_factory.mktemp("other") / "place"
        shutil.copytree(directory, other)
        (other / "index.html").unlink()
        assert write_index(other, QUESTIONS).read_bytes() == written
