"""The command as a user types it."""

import json

import pytest

from tests.commands import command
from tests.tokenizers import byte_level

pytest.importorskip("tokenizers")

SHOW = "experiments.show_finetuning_data"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    path = tmp_path_factory.mktemp("places")
    byte_level(path / "checkpoint")
    rows = [{"instruction": f"Say {n}.", "input": "", "output": "the answer " * n} for n in (1, 2, 0, 40)]
    (path / "alpaca.json").write_text(json.dumps(rows, indent=1))
    (path / "pairs.jsonl").write_text('{"instruction": "Why?", "response": "So."}\n{"instruction": "Why?"}\n')
    return path


def show(places, *flags, data="alpaca.json"):
    return command(SHOW, f"--data={places / data}", f"--checkpoint={places / 'checkpoint'}", *flags)


def test_the_response_is_marked(places):
    done = show(places, "--num=2", data="pairs.jsonl")
    assert done.returncode == 2  # the second row lacks its response
    done = show(places, "--num=1", "--template=chatml", data="pairs.jsonl")
    head, *text = done.stdout.splitlines()
    assert head.startswith(f"--- {places / 'pairs.jsonl'}: line 1: ") and "the loss on " in head, done.stderr
    assert text == ["<|begin|><|im_start|>user", "Why?<|im_end|>", "<|im_start|>assistant", "⟦So.<|im_end|>⟧", ""]


def test_every_token_and_the_report(places):
    done = show(places, "--num=2", "--format=jsonl", "--drop_empty", "--report", "--max_length=150", "--template=plain")
    shown = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["prompt"] for row in shown] == ["<|begin|>Say 1.", "<|begin|>Say 2."]
    assert [row["response"] for row in shown] == ["the answer <|end|>", "the answer the answer <|end|>"]
    said = done.stderr.splitlines()
    assert said[0].startswith("all sources: 3 examples, ") and "1 rows of 150 tokens" in said[-2], said
    assert said[-1].endswith(f"Skipped 1 empty rows (first: {places / 'alpaca.json'}: row 3, line 12)."), said

    done = show(places, "--num=1", "--format=tokens", "--template=plain")
    lines = done.stdout.splitlines()[1:-1]
    assert [line[7] == "|" for line in lines] == [bool(loss) for loss in shown[0]["loss_mask"]]
    assert [int(line[8:].split()[0]) for line in lines] == shown[0]["tokens"]


@pytest.mark.parametrize("flags, part", [
    (("--num=1", "--template=x"), "--template=x: must be plain, alpaca, "),
    (("--num=9",), "alpaca.json: row 3, line 12: the field 'output' is empty; fill it in, or skip such rows"),
    (("--max_length=9", "--report", "--drop_empty"), "--max_length=9: truncation leaves no response token"),
])  # fmt: skip
def test_a_mistake_is_one_line(places, flags, part):
    done = show(places, *flags)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: ") and part in lines[0], done.stderr
