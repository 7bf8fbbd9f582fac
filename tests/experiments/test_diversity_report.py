"""The command: tables, picture and page from a user's files; one clear line for every mistake."""

import csv
import json

import numpy as np
import pytest

from instrdiv.analysis.diversity import measure
from instrdiv.data.cleaning import Dropped
from instrdiv.data.embedding import Embedder
from instrdiv.data.schemas import TextRow
from instrdiv.reports import diversity_report
from instrdiv.runtime.files import write_json
from tests.commands import command
from tests.reports.test_report import EVIL, Page

MODULE = "experiments.diversity_report"
PROMPT = "what is the sum of the first ten odd whole numbers that are prime or one"


def cells(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def records(name, axes, count):
    return [
        {"instruction": f"{name} number {i % axes} of {axes}", "input": "", "output": f"answer {i}"}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    few = [*records("sort", 2, 40), {"instruction": "ask", "input": "", "output": f"It is: {PROMPT.upper()}"}]
    (directory / "few.jsonl").write_text("".join(json.dumps(record) + "\n" for record in few))
    many = [
        *records("translate", 30, 60),
        records("translate", 30, 60)[7],
        {"instruction": "x", "input": "", "output": ""},
    ]
    (directory / "many.jsonl").write_text("".join(json.dumps(record) + "\n" for record in many))
    (directory / "evaluation.jsonl").write_text(json.dumps({"prompt": PROMPT, "id": 1}) + "\n")
    return directory


@pytest.fixture(scope="module")
def mixture(files):
    run_dir = files / "mixture"
    flags = [f"--data=a={files / 'few.jsonl'},{files / 'many.jsonl'}", f"--run_dir={run_dir}", "--map=pca",
             f"--against={files / 'evaluation.jsonl'}", "--against_field=prompt", "--duplicates=exact", "--drop_empty",
             "--shares=a=0.4,many=0.6", "--budget=50", "--sample=15", "--same=0.9"]  # fmt: skip
    done = command(MODULE, *flags)
    assert done.returncode == 0, done.stderr
    return run_dir, done, flags


class TestMixture:
    def test_is_exact_and_listed(self, mixture):
        chosen = cells(mixture[0] / "mixture.csv")
        assert [row["source"] for row in chosen].count("a") == 20 and len(chosen) == 50
        assert len({row["where"] for row in chosen}) == 50 and [int(row["place"]) for row in chosen] == [*range(50)]

    def test_says_what_was_left_out(self, mixture, files):
        gone = cells(mixture[0] / "dropped.csv")
        assert [(row["source"], row["where"], row["reason"], row["like"]) for row in gone] == [
            ("a", f"{files / 'few.jsonl'}: line 41", "contamination", f"{files / 'evaluation.jsonl'}: line 1"),
            ("many", f"{files / 'many.jsonl'}: line 61", "exact duplicate", f"{files / 'many.jsonl'}: line 8"),
        ]
        assert gone[0]["matched"] == " ".join(PROMPT.split()[:13])
        counts = {
            (row["source"], row["reason"]): (row["kept"], row["dropped"]) for row in cells(mixture[0] / "cleaning.csv")
        }
        assert counts["a", "contamination"] == ("40", "1") and counts["many", "exact duplicate"] == ("60", "1")
        assert counts["many", "near duplicate"] == ("60", "0") and len(counts) == 6
        assert not {row["where"] for row in gone} & {row["where"] for row in cells(mixture[0] / "mixture.csv")}

    def test_has_the_numbers_and_says_of_what(self, mixture):
        run_dir, done, _ = mixture
        a, many, both = cells(run_dir / "diversity.csv")
        assert (a["texts"], a["distinct"], a["drawn"], a["draws"]) == ("20", "2", "15", "5")
        assert float(a["clusters"]) <= 2 < float(many["clusters"]) and both["texts"] == "50"
        assert (
            "hashed" in a["embedder"]
            and "effective clusters" in done.stdout
            and str(run_dir / "report.html") in done.stdout
        )
        said = json.loads((run_dir / "provenance.json").read_text())
        assert said["asked"]["data"] == {"a": "41 rows", "many": "61 rows"}
        assert said["asked"]["mixture"] == {"a": "20 rows", "many": "30 rows"}
        assert said["asked"]["empty rows skipped"] == "1"
        assert all(digest.startswith("SHA-256 ") for digest in said["files"].values()) and len(said["files"]) == 3

    def test_leaves_a_picture_and_a_page_that_needs_nothing_else(self, mixture):
        run_dir, _, flags = mixture
        assert (run_dir / "figure.png").stat().st_size > 10_000 and (run_dir / "figure.pdf").exists()
        page = Page((run_dir / "report.html").read_text())
        assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
        assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
        assert "python -m experiments.diversity_report" in page.text and flags[-1] in page.text
        assert [row[0] for row in page.table("source", "texts")] == ["a", "many", "all"]
        assert page.table("source", "reason")[0][:3] == ["a", "contamination", "1"]

    def test_is_not_overwritten_unasked_and_comes_out_the_same(self, mixture):
        run_dir, _, flags = mixture
        again = command(MODULE, *flags)
        assert again.returncode == 2 and "already holds a report" in again.stderr and again.stderr.count("\n") == 1
        tables = {name: (run_dir / name).read_bytes() for name in diversity_report.FILES}
        assert command(MODULE, *flags, "--overwrite").returncode == 0
        assert tables == {name: (run_dir / name).read_bytes() for name in diversity_report.FILES}


def test_names_and_texts_come_out_as_text(tmp_path):
    rows = {
        EVIL: [TextRow(f"{EVIL} {i}", "so", EVIL, f"line {i}") for i in range(6)],
        "7": [TextRow("one", "so", "7", "line 1")] * 4,
    }
    embedder = Embedder(EVIL, 0.5, lambda texts: np.eye(9)[[len(text) % 9 for text in texts]])
    found = measure({name: [row.instruction for row in of] for name, of in rows.items()}, embedder, layout="pca")
    diversity_report.write_tables(tmp_path, found, rows)
    diversity_report.write_cleaning(tmp_path, rows, [Dropped(rows[EVIL][0], "contamination", rows["7"][0], EVIL)])
    write_json(tmp_path / "provenance.json", {"command": ["x"], "versions": {}, "devices": [], "asked": {"data": EVIL}})
    diversity_report.draw(tmp_path, "instruction", "pca")
    page = Page(diversity_report.write_diversity_report(tmp_path).read_text())
    assert not page.all("script") and page.text.count(EVIL) > 5
    assert [row[0] for row in page.table("source", "texts")] == [EVIL, "7", "all"]


@pytest.mark.parametrize(
    "flags, said",
    [
        ([], "pass either --data=FILE,… (the files to analyze) or --example"),
        (["--data={few}", "--budget=5"], "--budget=5: has no effect without --shares"),
        (["--data={few}", "--embedder=bert"], "--embedder=bert: must be hashed"),
        (["--data=all={few}"], "all is reserved for all sources together"),
        (["--data={few},{few}"], "few is the name of two files; use another name, NAME="),
        (["--data={many}"], "line 62: the field 'output' is empty"),
        (["--data={few}", "--against={evaluation}", "--against_field=text"], "lacks the field 'text'; it has 'prompt'"),
        (
            ["--data={many}", "--drop_empty", "--duplicates=exact", "--shares=many=61"],
            "needs 61 rows from many, which has 60",
        ),
        (["--data={few}", "--run_dir={directory}"], "holds something else"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing_behind(flags, said, files, tmp_path):
    names = {name: files / f"{name}.jsonl" for name in ("few", "many", "evaluation")} | {"directory": files}
    done = command(MODULE, f"--run_dir={tmp_path / 'run'}", *(flag.format(**names) for flag in flags))
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and said in line and "Traceback" not in done.stderr
