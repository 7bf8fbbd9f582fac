"""Figures show every member, the threshold and the training regime; identical tables give identical files."""

from instrdiv.analysis import plots
from instrdiv.config.presets import LAPTOP
from tests.analysis.test_thresholds import table


def results(seeds=3):
    unseen = {s: {16: 0.0, 128: 0.1 * s, 256: 0.9, 4096: 0.98} for s in range(seeds)}
    rows = table(unseen) + table({s: {i: 0.97 for i in unseen[0]} for s in range(seeds)}, "seen")
    extra = {"examples_seen": 40_000, "tests": 2_000}
    return [LAPTOP.as_row() | row | extra for row in rows]


def test_every_member_has_a_point():
    axes = plots.instruction_curve(results()).axes[0]
    points = [
        line
        for line in axes.lines
        if (line.get_marker() in "os" and line.get_linestyle() == "None") or line.get_alpha() == 0.65
    ]
    shown = sum(len(line.get_xdata()) for line in points)
    assert shown == 2 * 3 * 4


def test_caption_says_seeds_tests_and_regime():
    text = plots.caption(results())
    for part in (
        "3 seeds",
        "2,000 unseen",
        "16,384 examples",
        "3 epochs (40,000 examples seen)",
        "muon",
        "input 8, pattern 3, planted once (75%) or 2 times (25%)",
    ):
        assert part in text


def test_the_threshold_and_the_papers_band_are_in_the_legend():
    legend = plots.instruction_curve(results(), reported_band=(300, 1000)).axes[0].get_legend()
    text = " ".join(t.get_text() for t in legend.get_texts())
    assert "I50 = " in text and "95 % interval" in text and "300–1,000" in text


def test_diverged_members_are_crosses():
    rows = results()
    rows[0]["status"] = "diverged at step 7"
    figure = plots.instruction_curve(rows)
    assert [line for line in figure.axes[0].lines if line.get_marker() == "x"]
    assert "1 diverged" in figure._supxlabel.get_text()


def test_identical_tables_give_identical_files(tmp_path):
    for name in ("a", "b"):
        plots.instruction_curve(results(), tmp_path / name)
    for suffix in (".png", ".pdf"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_one_seed_and_no_threshold_can_be_drawn(tmp_path):
    rows = [row for row in results(1) if row["instructions"] < 256]
    figure = plots.instruction_curve(rows, tmp_path / "f")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "f.pdf").read_bytes()[:4] == b"%PDF"
    assert "no threshold" in " ".join(t.get_text() for t in figure.axes[0].get_legend().get_texts())


def test_the_share_of_models_above_one_half_stands_above_each_count():
    (top,) = plots.instruction_curve(results()).axes[0].child_axes
    assert [label.get_text() for label in top.get_xticklabels()] == ["0/3", "0/3", "3/3", "3/3"]


def test_labels_that_would_run_into_another_are_left_out():
    counts = {100: 0.0, 120: 0.0, 200: 0.9, 1000: 1.0, 1_000_000: 1.0}
    axes = plots.instruction_curve(
        [LAPTOP.as_row() | row | {"examples_seen": 1, "tests": 1} for row in table({0: counts})]
    ).axes[0]
    below, above = ([label.get_text() for label in of.get_xticklabels()] for of in (axes, axes.child_axes[0]))
    assert below == ["100", "", "200", "1,000", "1,000,000"]
    assert above == ["0/1", "", "1/1", "1/1", "1/1"]
    assert list(axes.get_xticks()) == list(counts), "each count has its line"


def test_a_notebook_shows_the_picture():
    assert plots.instruction_curve(results())._repr_png_().startswith(b"\x89PNG")
