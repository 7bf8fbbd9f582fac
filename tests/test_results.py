"""Every number in the results of README.md and docs/results.md is read here from the table it comes from."""

import csv
import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import pytest

ROOT = Path(__file__).parents[1]
LAPTOP = ROOT / "results" / "laptop"
GPU = ROOT / "results" / "gpu"
NUMBER = re.compile(r"(?<![A-Z\d])[+-]?\d[\d,.]*")  # not I50 or H200


def table(figure: str, name: str, where: Path = LAPTOP) -> list[dict[str, str]]:
    with (where / figure / name).open(newline="") as file:
        return list(csv.DictReader(file))


def claims(figure: str) -> list[str]:
    """The evidence of each claim; all of them must hold, since the pages say "reproduced"."""
    rows = table(figure, "claims.csv")
    assert all(row["holds"] == "1" for row in rows)
    return [row["evidence"].replace(" %", "%") for row in rows]


def means(
    figure: str, *by: str, split: str = "unseen", part: str = "has_op", where: Path = LAPTOP
) -> dict[tuple[float, ...], float]:
    """Exact match, the mean over seeds, by the values of these columns."""
    values = defaultdict(list)
    for row in table(figure, "results.csv", where):
        if (row["split"], row["slice"]) == (split, part):
            values[tuple(float(row[column]) for column in by)].append(float(row["exact_match"]))
    return {key: fmean(cells) for key, cells in values.items()}


def i50(row: dict[str, str]) -> str:
    return f"{float(row['i50']):.0f} ({float(row['i50_low']):.0f} to {float(row['i50_high']):.0f})"


def interval(row: dict[str, str], name: str, places: str = ".2f") -> str:
    value, low, high = (format(float(row[name + end]), places) for end in ("", "_low", "_high"))
    return f"{value} ({low} to {high})"


def span(values: list[float], places: str = ".2f") -> str:
    return f"{format(min(values), places)} to {format(max(values), places)}"


def rounded(text: str, sign: str = "") -> str:
    """The numbers of a claim's evidence, to two places."""
    return f"{float(text):{sign}.2f}"


def instruction_count() -> list[str]:
    evidence = claims("fig2a_instruction_count")[3]
    step, low, high = re.match(r"I50 = (\d+) \(95% interval (\d+) to (\d+) over 3 seeds\)", evidence).groups()
    unseen = means("fig2a_instruction_count", "instructions")
    seen = means("fig2a_instruction_count", "instructions", split="seen")
    assert max(value for (count,), value in unseen.items() if count <= 64) < 0.01
    assert min(value for (count,), value in unseen.items() if count >= 1024) > 0.9
    assert min(seen.values()) > 0.9
    return [
        f"I50 = {step} ({low} to {high})",
        f"At I = 16, exact match is {unseen[16,]:.2f} on unseen rules and {seen[16,]:.2f} on seen ones",
        f"at I = 16,384 it is {unseen[16384,]:.2f} on unseen rules",
        f"{len({row['member'] for row in table('fig2a_instruction_count', 'results.csv')})} small transformers",
        "64 different rules or fewer",
        "trained on 1,024 or more",
    ]


def no_ops() -> list[str]:
    first, second, third = table("fig2b_no_ops", "figure.csv")
    assert claims("fig2b_no_ops") and {first["seeds"], second["seeds"], third["seeds"]} == {"5"}
    assert [row["no_op_fraction"] for row in (first, second, third)] == ["0.1", "0.3", "0.5"]
    unseen = means("fig2b_no_ops", "instructions", "no_op_fraction")
    copied = means("fig2b_no_ops", "instructions", "no_op_fraction", part="no_op")
    settings = {row["member"]: row for row in table("fig2b_no_ops", "results.csv")}
    wrong: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in table("fig2b_no_ops", "errors.csv"):
        if row["slice"] == "no_op/near_miss":
            setting = settings[row["member"]]
            share = float(row["count"]) / float(row["tests"])
            wrong[setting["instructions"], setting["no_op_fraction"]][row["error"]].append(share)
    near = {key: 1 - sum(map(fmean, errors.values())) for key, errors in wrong.items()}
    of = [("4096", row["no_op_fraction"]) for row in (first, second, third)]
    few = [value for (count, _), value in near.items() if count == "64"]
    few += [value for (count, _), value in copied.items() if count == 64]
    return [
        f"I50 = {i50(first)}, {i50(second)}, and {i50(third)} over 5 seeds",
        f"I50 = {float(first['i50']):.0f}, {float(second['i50']):.0f}, {float(third['i50']):.0f} at 10, 30, 50% no-ops",
        f"{interval(second, 'ratio')} and {interval(third, 'ratio')} times as high "
        f"({second['comparisons']} comparisons)",
        f"exact match on has-op examples is {span([v for (count, _), v in unseen.items() if count == 4096])}",
        f"copy {span([100 * v for (count, _), v in copied.items() if count == 4096], '.0f')}% of such inputs",
        f"copy only {span([100 * near[key] for key in of], '.0f')}%",
        f"{span([100 * fmean(wrong[key]['wrong site']) for key in of], '.0f')}% of these they rewrite",
        f"at least {100 * min(few) // 1:.0f}% of both kinds are copied",
    ]


def long_tail() -> list[str]:
    assert claims("fig3_long_tail")
    unseen = means("fig3_long_tail", "instructions", "tail_shape")
    rows = table("fig3_long_tail", "figure.csv")
    residual = {row["measure"]: f"{float(row['residual']):.2f}" for row in rows}
    assert (len(rows), rows[0]["compared"]) == (8, "8")
    return [
        f"8,192 rules hold ({unseen[8192, 0.03]:.2f} at shape 0.03)",
        f"fall from {unseen[512, float('inf')]:.2f} (uniform) to {unseen[512, 0.1]:.2f} at shape 0.1 and "
        f"{unseen[512, 0.03]:.2f} at 0.03",
        f"exact match {unseen[8192, 0.03]:.2f} at I = 8,192, {unseen[512, 0.03]:.2f} at 512",
        f"rms error of {residual['all rules']} if all rules are counted",
        f"{residual['effective number (entropy)']} with the effective number of rules",
        f"{residual['rules with at least 2 examples']} with the rules that have at least two examples",
        f"{residual['rules with at least 4 examples']} with those that have at least four",
        f"{rows[0]['members']} models",
    ]


def occurrences() -> list[str]:
    few, *many = claims("table1_occurrences")
    assert few.startswith("I = 64:") and set(re.findall(r"0\.\d+", few)) == {"0.000"}
    assert [text.partition(":")[0] for text in many] == ["I = 512", "I = 4,096"]
    leads = [re.search(r"ahead of the best of 3 by (\S+ \(.*?\)) over 3 seeds", text)[1] for text in many]
    return [f"by {leads[0]} and {leads[1]}", f"ahead of the best by {leads[0]} at I = 512", "At I = 64 all are at 0.00"]


def encrypted() -> list[str]:
    unseen, _, evenly, unevenly = claims("finetune_encrypted")
    assert re.findall(r"I = ([\d,]+):", unseen) == ["64", "256", "1,024", "4,096"]
    values = [rounded(text) for text in re.findall(r": ([\d.]+)", unseen)]
    even, uneven = (re.match(r"(\S+) \((\S+) to (\S+)\)", text).groups() for text in (evenly, unevenly))
    return [
        f"{', '.join(values[:-1])}, and {values[-1]} of unseen encrypted rules at I = 64, 256, 1,024, and 4,096",
        f"{', '.join(values)} at I = 64, 256, 1,024, 4,096",
        f"by {rounded(even[0], '+')} ({rounded(even[1])} to {rounded(even[2])})",
        f"by another {rounded(uneven[0])} ({rounded(uneven[1])} to {rounded(uneven[2])})",
    ]


def scaling() -> list[str]:
    rows = {(row["factor"], float(row["level"])): row for row in table("threshold_scaling", "figure.csv")}
    one, three, five = (rows["epochs", level] for level in (1, 3, 5))
    assert (one["seeds"], one["seeds_outside"], one["above"]) == ("1", "2", "512.0")
    assert {row["comparisons"] for row in rows.values()} == {"8"}
    assert {("width", 32), ("width", 96), ("examples", 4096), ("examples", 12 * 4096)} <= set(rows)
    return [
        f"by I = 512; the third does at {float(one['i50']):.0f}",
        f"I50 is {i50(three)}",
        f"it is {i50(five)}",
        f"exponents {interval(rows['width', 64], 'exponent')} and {interval(rows['examples', 16384], 'exponent')}",
        f"ratios {interval(rows['depth', 4], 'ratio')} and {interval(rows['depth', 2], 'ratio')}",
    ]


def papers_size() -> list[str]:
    figure = "fig2a_instruction_count"
    unseen = {int(count): value for (count,), value in means(figure, "instructions", where=GPU).items()}
    seen = means(figure, "instructions", split="seen", where=GPU)
    rows = table(figure, "results.csv", GPU)
    assert {row["seed"] for row in rows} == {"0"} and {(row["layers"], row["width"]) for row in rows} == {("6", "256")}
    first, *others = sorted(unseen)
    *middle, last = (f"{unseen[count]:.2f} at {count:,}" for count in others)
    launches = [json.loads(path.read_text()) for path in sorted((GPU / figure).glob("provenance*.json"))]
    minutes = sorted((one["wall_seconds"] / 60 for one in launches), reverse=True)
    return [
        f"is {unseen[first]:.2f} at I = {first}, {', '.join(middle)}, and {last}",
        f"it is at least {min(seen.values()) * 100 // 1 / 100:.2f} everywhere",
        "took {:.1f} and {:.1f} minutes".format(*minutes),
        f"{unseen[120]:.2f} at I = 120, {unseen[200]:.2f} at 200",
    ]


def speed() -> list[str]:
    benchmark = ROOT / "results" / "benchmark"

    def reached(run: str, what: str) -> str:
        lines = (benchmark / run / "targets.md").read_text().splitlines()
        return next(line.split("|")[4].strip() for line in lines if line.startswith(f"| {what}"))

    def rate(run: str, kind: str, optimizer: str = "") -> float:
        with (benchmark / run / "benchmark.csv").open(newline="") as file:
            return next(
                float(row["tokens_per_second"])
                for row in csv.DictReader(file)
                if row["kind"] == kind and optimizer in row["label"]
            )

    startup = json.loads((benchmark / "laptop-cpu" / "benchmark.json").read_text())["startup"]
    assert 4 <= startup["warm"] < 5
    adamw = rate("laptop-cpu", "population", "adamw") / rate("laptop-cpu", "gpt2_eager_fp32")
    return [
        f"{rate('laptop-cpu', 'population') / 1000:.0f} k tokens per second",
        f"{reached('laptop-cpu', 'laptop shape, 8 members').strip('x')} times as many as one after another",
        f"{reached('laptop-cpu', 'the same against PyTorch eager one after').strip('x')} times as many as PyTorch's",
        f"{adamw:.2f} times with AdamW",
        f"{rate('gpu-nvidia-h200', 'population') / 1e6:.2f} M tokens per second",
        f"{reached('gpu-nvidia-h200', 'the same against PyTorch GPT-2 compiled bf16, best').strip('x')} times the rate",
        f"{rate('paper-cpu', 'gpt2_compiled_fp32') / 1000:.1f} k against "
        f"{rate('paper-cpu', 'population') / 1000:.1f} k tokens per second",
    ]


#: By heading of docs/results.md: what its tables say, and the other numbers: of settings, of the papers, of names.
SECTIONS = {
    "Figure 2a: number of instructions": (instruction_count, "2 3 300 1,000 1"),
    "Figure 2b: no-ops": (no_ops, "2 3 10 30 50 400 4,096 64"),
    "Figures 3 and 7: long tail": (long_tail, "3 7 10,000 1,000 0.2 512 8,192"),
    "Table 1: occurrences": (occurrences, "1 2 3 12 200 0 64 512 4,096"),
    "Encrypted rewriting with LoRA": (encrypted, "5 3 2 7"),
    "What moves the threshold": (scaling, "3 50"),
    "The papers' size": (papers_size, "2 6 256 50 20 1.5 10 300 1,000"),
    "Speed": (speed, "2 32 16 512 64"),
}


def sections(page: str) -> dict[str, str]:
    """Text by heading, without commands; links without their targets, white space collapsed."""
    parts = re.split(r"^#+ (.*)$", re.sub(r"^    .*$", "", page, flags=re.MULTILINE), flags=re.MULTILINE)
    return {
        re.sub(r" \(`.*`\)$", "", heading): " ".join(re.sub(r"\]\([^)]*\)|`[^`]*`", "]", text).split())
        for heading, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def unaccounted(text: str, phrases: list[str], others: str) -> list[str]:
    """Numbers of a text that neither a phrase has nor the others are."""
    for phrase in sorted(phrases, key=len, reverse=True):
        text = text.replace(phrase, "")
    return [number for number in NUMBER.findall(text) if number.rstrip(".,").lstrip("+-") not in others.split()]


@pytest.mark.parametrize("heading", SECTIONS)
def test_every_result_comes_from_its_table(heading):
    read, others = SECTIONS[heading]
    text = sections((ROOT / "docs" / "results.md").read_text())[heading]
    readme = " ".join((ROOT / "README.md").read_text().split())
    phrases = read()
    assert [phrase for phrase in phrases if phrase not in text and phrase not in readme] == []
    assert unaccounted(text, phrases, others) == []


def test_cost_of_checkpoints_comes_from_its_table():
    last = table("fig2a_instruction_count", "timings.csv")
    share = sum(float(row["checkpoint_seconds"]) for row in last) / float(last[-1]["elapsed_seconds"])
    assert f"Checkpoints cost {100 * share:.1f}% of" in (ROOT / "docs" / "running.md").read_text()


def test_every_number_in_the_readme_comes_from_a_table():
    """In its caption and in its results: of the papers, of settings, and of names are those at the end."""
    page = (ROOT / "README.md").read_text()
    phrases = [phrase for read, _ in SECTIONS.values() for phrase in read()]
    caption = " ".join(page[page.index("\n*24 ") : page.index("training examples.*")].split())
    assert unaccounted(caption, phrases, "") == []
    text = sections(page)["Results"]
    assert unaccounted(text, phrases, "95 50 2 3 7 1 300 1,000 400 10,000") == []


@pytest.mark.parametrize("heading", SECTIONS)
def test_a_changed_number_is_noticed(heading):
    """Any number that a table gives, changed in the page, is an unaccounted one."""
    read, others = SECTIONS[heading]
    text = sections((ROOT / "docs" / "results.md").read_text())[heading]
    phrases = [phrase for phrase in read() if phrase in text]
    assert phrases
    for phrase in phrases:
        for match in NUMBER.finditer(phrase):
            wrong = phrase[: match.start()] + "77" + phrase[match.end() :]
            assert unaccounted(text.replace(phrase, wrong), phrases, others) != [], phrase
