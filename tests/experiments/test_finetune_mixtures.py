"""The launcher of mixtures, as a user types it, over a tiny base and tiny files."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from experiments import finetune_mixtures as launcher
from instrdiv.data.tokenizer import Tokenizer, character_tokenizer, write_tokenizer
from instrdiv.launch.finetuning import launch_finetuning
from instrdiv.models import llama, lora
from instrdiv.models.llama import Model
from instrdiv.models.llama_config import ModelConfig
from instrdiv.models.weights import read_weights, write_weights
from instrdiv.training.pretraining import SmallBase, random_weights
from instrdiv.training.recipe import Recipe
from tests import adapters as worlds
from tests.commands import command

MODULE = "experiments.finetune_mixtures"
ALPHABET = "abcdefghijklmnopqrstuvwxyz 0123456789\n"
HELD_OUT = 5
MIXTURES = ("oss=12", "oss=16", "oss=12,alpaca=6")
#: Eight words in a row: looked for as a whole.
EVALUATION = "what is the sum of seven and eight please"


def texts(kind, count, letters):
    """(question, answer) pairs, all different; answers of a kind have letters of their own, which can be learned."""
    rng = np.random.default_rng(count)
    words = ["".join(rng.choice(list(letters), rng.integers(2, 9))) for _ in range(count)]
    return [(f"{kind} {i}", word) for i, word in enumerate(words)]


def write_lines(path, records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A directory with a base and files; among them a row that repeats another, and one that repeats a test."""
    path = tmp_path_factory.mktemp("world")
    small = SmallBase(layers=1, width=16, heads=2, mlp_width=24, instructions=1, examples=1, recipe=Recipe())
    config = small.config(len(ALPHABET) + 2, end_token=1)
    write_weights(path / "base", config, random_weights(config, 0), "float32")
    write_tokenizer(
        path / "base", character_tokenizer(ALPHABET, ("<pad>", "</s>")), pad_token="<pad>", eos_token="</s>"
    )
    oss = [{"problem": question, "solution": answer} for question, answer in texts("code", 30, "abc")]
    oss[7] = {"problem": f"tell me {EVALUATION} now", "solution": "15"}
    oss[9] = {name: text.replace(" ", "  ") for name, text in oss[3].items()}
    write_lines(path / "oss.jsonl", oss)
    alpaca = [{"instruction": q, "input": "", "output": answer} for q, answer in texts("prose", 20, "xyz")]
    write_lines(path / "alpaca.jsonl", alpaca)
    write_lines(path / "tests.jsonl", [{"prompt": EVALUATION}])
    return path


def flags(world, *more, mixtures=MIXTURES):
    return (
        f"--base={world / 'base'}",
        f"--data=oss={world / 'oss.jsonl'},alpaca={world / 'alpaca.jsonl'}",
        *(f"--mixtures={mixture}" for mixture in mixtures),
        f"--against={world / 'tests.jsonl'}",
        "--against_field=prompt",
        "--template=plain",
        "--max_length=32",
        "--seeds=2",
        f"--held_out={HELD_OUT}",
        "--noint8",
        "--rank=2",
        "--learning_rate=0.05",
        "--config.precision=float32",
        "--config.reports=1",
        "--config.remat=false",
        *more,
    )


def table(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(world):
    run_dir = world / "run"
    done = command(MODULE, *flags(world, f"--run_dir={run_dir}"))
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return run_dir, done


def members_of(run_dir):
    """(mixture, seed) -> id"""
    return {(row["mixture"], int(row["seed"])): row["member"] for row in table(run_dir / "results.csv")}


def rows_of(run_dir, member):
    return [(row["source"], row["where"]) for row in table(run_dir / "rows" / f"{member}.csv")]


def test_it_leaves_tables_picture_page_and_adapters(finished):
    run_dir, done = finished
    names = {path.name for path in run_dir.iterdir()}
    assert {"results.csv", "base.csv", "packing.csv", "cleaning.csv", "dropped.csv", "held_out.csv", "rows",
            "figure.png", "figure.pdf", "report.html", "adapters", "metrics.csv", "config.json"} <= names  # fmt: skip
    members = members_of(run_dir)
    assert set(members) == {(mixture, seed) for mixture in MIXTURES for seed in (0, 1)}
    assert {path.name for path in (run_dir / "adapters").iterdir()} == set(members.values())
    results = table(run_dir / "results.csv")
    assert [row["source"] for row in results] == ["oss", "alpaca"] * 6
    base = {row["source"]: float(row["loss"]) for row in table(run_dir / "base.csv")}
    for row in results:
        assert float(row["less_than_base"]) == pytest.approx(base[row["source"]] - float(row["loss"]), abs=1e-9)
    trained = [row for row in results if f"{row['source']}=" in row["mixture"]]
    assert all(float(row["less_than_base"]) > 0.01 for row in trained), "what is trained on is learned"
    assert "Not judged" in done.stdout and "held-out loss of the base" in done.stdout
    page = (run_dir / "report.html").read_text()
    assert "data:image/png" in page and "<script" not in page and f"experiments.{run_dir.name}" not in page
    assert "python -m experiments.finetune_mixtures" in page and "oss=12, alpaca=6" in page


def test_cleaning_is_told_row_by_row(finished, world):
    dropped = {row["where"]: row["reason"] for row in table(finished[0] / "dropped.csv")}
    assert dropped == {
        f"{world / 'oss.jsonl'}: line 8": "contamination",
        f"{world / 'oss.jsonl'}: line 10": "exact duplicate",
    }
    kept = {row["source"]: int(row["kept"]) for row in table(finished[0] / "cleaning.csv")}
    assert kept == {"oss": 28, "alpaca": 20}


def test_mixtures_are_exact_nested_and_without_what_is_held_out_or_dropped(finished):
    run_dir, _ = finished
    held_out = [(row["source"], row["where"]) for row in table(run_dir / "held_out.csv")]
    assert [source for source, _ in held_out] == ["oss"] * HELD_OUT + ["alpaca"] * HELD_OUT
    never = {said(where) for _, where in held_out}
    dropped = {row["where"] for row in table(run_dir / "dropped.csv")}
    chosen = {key: rows_of(run_dir, member) for key, member in members_of(run_dir).items()}
    for (mixture, _), rows in chosen.items():
        asked = {name: int(count) for name, count in (part.split("=") for part in mixture.split(","))}
        sources = [source for source, _ in rows]
        assert {name: sources.count(name) for name in asked} == asked and len(rows) == sum(asked.values())
        assert len(set(rows)) == len(rows)
        assert dropped.isdisjoint(where for _, where in rows) and never.isdisjoint(said(where) for _, where in rows)
    for seed in (0, 1):
        fewer, more = chosen["oss=12", seed], chosen["oss=16", seed]
        assert more[:12] == fewer
        assert [row for row in chosen["oss=12,alpaca=6", seed] if row[0] == "oss"] == fewer
    assert chosen["oss=12", 0] != chosen["oss=12", 1]


def record_at(where):
    """What the file has there, read without our code."""
    path, line = where.rsplit(": line ", 1)
    return json.loads(Path(path).read_text().splitlines()[int(line) - 1])


def said(where):
    return " ".join(" ".join(record_at(where).values()).split())


def test_members_share_their_steps_and_the_table_says_how_many_epochs_each_saw(finished):
    run_dir, _ = finished
    packing = [row for row in table(run_dir / "packing.csv") if row["source"] == "all"]
    most = max(int(row["packed_rows"]) for row in packing)
    steps = -(-3 * most // 4)  # three epochs of batches of four
    assert {int(row["step"]) for row in table(run_dir / "results.csv")} == {steps}
    for row in packing:
        assert float(row["epochs"]) == pytest.approx(4 * steps / int(row["packed_rows"]))
    epochs = {row["member"]: row["epochs"] for row in packing}
    assert all(row["epochs"] == epochs[row["member"]] for row in table(run_dir / "results.csv"))


def test_held_out_loss_is_that_by_hand(finished, world):
    """From the files, the adapter that was written, and the logits of every example alone."""
    run_dir, _ = finished
    config, tokenizer = ModelConfig.from_json(world / "base"), Tokenizer.load(world / "base")
    weights = read_weights(world / "base", config)
    asked = {"oss": [], "alpaca": []}
    for row in table(run_dir / "held_out.csv"):
        record = record_at(row["where"])
        fields = ("problem", "solution") if row["source"] == "oss" else ("instruction", "output")
        question, answer = (record[name] for name in fields)
        asked[row["source"]].append((tokenizer.encode(question), [*tokenizer.encode(answer), 1]))

    def losses(weights):
        found = {}
        for source, pairs in asked.items():
            tokens = np.zeros((len(pairs), 64), np.int32)  # what follows an example is not seen by it
            for i, (prompt, answer) in enumerate(pairs):
                tokens[i, : len(prompt + answer)] = prompt + answer
            x, _ = llama.hidden(Model(config, weights), worlds.rows_of(tokens))
            z = np.asarray(llama.logits(Model(config, weights), x), np.float64)
            log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
            spread = [
                -log_p[i, len(prompt) + j - 1, token]
                for i, (prompt, answer) in enumerate(pairs)
                for j, token in enumerate(answer)
            ]
            found[source] = np.mean(spread)
        return found

    of_base = losses(weights)
    for row in table(run_dir / "base.csv"):
        assert float(row["loss"]) == pytest.approx(of_base[row["source"]], rel=1e-5)
        assert int(row["tokens"]) == sum(len(answer) for _, answer in asked[row["source"]])
    found = {(row["member"], row["source"]): float(row["loss"]) for row in table(run_dir / "results.csv")}
    for member in list(dict.fromkeys(member for member, _ in found))[::5]:
        one, adapter = lora.read_adapter(run_dir / "adapters" / member, config)
        by_hand = losses(lora.merge(weights, one, adapter))
        assert {source: found[member, source] for source in asked} == pytest.approx(by_hand, rel=1e-5)


def test_the_same_command_reads_it_back_and_another_is_refused(finished, world):
    run_dir, _ = finished
    names = ("results.csv", "base.csv", "packing.csv", "metrics.csv")
    before = {name: (run_dir / name).read_bytes() for name in names}
    (run_dir / "figure.png").unlink()
    again = command(MODULE, *flags(world, f"--run_dir={run_dir}"))
    assert again.returncode == 0 and (run_dir / "figure.png").exists(), again.stderr
    assert "on held-out rows" not in again.stderr
    assert {name: (run_dir / name).read_bytes() for name in names} == before


def test_mistakes_are_one_line_and_leave_nothing(world, finished, capsys):
    """All in one process."""
    (world / "bare.jsonl").write_text('{"problem": "a", "solution": "b"}\n{"problem": "a"}\n')
    known = flags(world)
    cases = [
        (known[1:], ["--base: must be given, --base=DIR"]),
        ((known[0], *known[2:]), ["--data: must be given"]),
        (flags(world, mixtures=()), ["--mixtures: must be given"]),
        (flags(world, mixtures=("cot=4",)), ["--mixtures: there is no source cot; --data has oss, alpaca"]),
        (flags(world, mixtures=("oss=24",)), ["--mixtures=oss=24: needs 24 rows", "has 23 of 30 left", "out 5"]),
        (flags(world, mixtures=("oss=99",)), ["needs 99 rows from oss, with 30 in all"]),
        (flags(world, mixtures=("oss=0.5",)), ["--mixtures=oss=0.5: without --budget"]),
        (flags(world, mixtures=("oss",)), ["--mixtures=oss: 'oss' is not SOURCE=NUMBER"]),
        (flags(world, mixtures=("oss=4", "oss=4")), ["--mixtures=oss=4: is given twice"]),
        (flags(world, "--held_out=20"), ["--held_out=20: alpaca has 20 rows after cleaning"]),
        (flags(world, f"--base={world / 'nowhere'}"), [f"{world / 'nowhere'}", "there is no such file"]),
        (flags(world, "--data=oss=nowhere.jsonl"), ["nowhere.jsonl: there is no such file"]),
        (flags(world, f"--data=oss={world / 'bare.jsonl'}"), ["bare.jsonl: line 2: lacks the field 'solution'"]),
        (flags(world, "--template=rhyme"), ["--template=rhyme: must be"]),
        (flags(world, "--max_length=2"), ["--max_length=2"]),
        (flags(world, "--epochs=2", "--config.steps=3"), ["--epochs=2: give this or --config.steps=3, not both"]),
        (flags(world, "--targets=w_proj"), ["--targets=w_proj: w_proj is not a linear layer"]),
        (flags(world, "--config.microbatch_size=3"), ["--config.microbatch_size=3: must divide"]),
        (flags(world, "--preset=smoke", "--data=x", mixtures=()), ["--mixtures: must be given"]),
        (flags(world, "--epochs=9", f"--run_dir={finished[0]}"), ["already contains a different run", "recipe.steps"]),
    ]  # fmt: skip
    run_dir, said = world / "mistaken", []
    for arguments, _ in cases:
        assert launch_finetuning(launcher.FINETUNING, [f"--run_dir={run_dir}", *arguments]) == 2
        said.append(capsys.readouterr().err.splitlines()[-1])
    for (_, words), line in zip(cases, said, strict=True):
        assert all(word in line for word in words) and "\n" not in line, (words, line)
    assert not run_dir.exists()


def test_smoke_needs_nothing_and_a_dry_run_writes_nothing(tmp_path):
    done = command(MODULE, "--preset=smoke", "--dry_run", f"--run_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert "plain=48,encrypted=16: 64 examples" in done.stdout and "4 adapters of rank 4" in done.stdout
    assert "training: about 0:00:" in done.stdout and "GB per device" in done.stdout
    assert not list(tmp_path.iterdir())
