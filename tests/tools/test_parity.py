"""The parity table: the row of a family, that differences are detected, and the committed table."""

import dataclasses
from pathlib import Path

import jax
import pytest

from instrdiv.runtime.tables import read_table
from tools.parity import COLUMNS, FAMILIES, NEW_TOKENS, Pair, as_markdown, measure, random_prompts, random_rows

COMMITTED = Path(__file__).parents[2] / "results" / "finetuning" / "parity.csv"
DIFFERENCES = ("logits", "left_padded", "right_padded", "cache", "peft_read", "peft_written", "int8")


@pytest.fixture(autouse=True)
def _needs():
    for package in ("torch", "transformers", "peft"):
        pytest.importorskip(package, reason="needed for the comparison")


def test_a_row_of_the_table(tmp_path):
    row = measure("Qwen2.5", tmp_path)
    assert tuple(row) == COLUMNS and row["family"] == "Qwen2.5" and row["tokens_equal"] == NEW_TOKENS
    assert all(0 < row[name] < 1e-4 for name in DIFFERENCES) and row["logit_spread"] > 1
    head, _, line = as_markdown([row]).splitlines()
    assert head.count("|") == line.count("|") == len(COLUMNS) + 1 and line.startswith("| Qwen2.5 | ")


def test_a_difference_would_be_seen(tmp_path):
    pair, tokens = Pair.make("Llama-2", tmp_path), random_rows()[0]
    layers = pair.weights["layers"] | {"post_norm": pair.weights["layers"]["post_norm"] * 1.1}
    other = dataclasses.replace(pair, weights=pair.weights | {"layers": layers})
    assert abs(other.our_logits(tokens) - other.their_logits(tokens)).max() > 1e-2
    assert (other.our_tokens(random_prompts(), 64) != other.their_tokens(random_prompts(), 64)).any()


def test_two_models_of_a_family_differ_by_their_seed(tmp_path):
    first, second = (Pair.make("Llama-2", tmp_path / str(seed), seed) for seed in (0, 1))
    assert not jax.numpy.array_equal(first.weights["embed"], second.weights["embed"])


def test_what_is_committed_has_every_family_and_says_that_they_agree():
    rows = read_table(COMMITTED, COLUMNS)
    assert [row["family"] for row in rows] == list(FAMILIES)
    for row in rows:
        assert all(row[name] < 1e-4 for name in DIFFERENCES) and row["tokens_equal"] == row["new_tokens"] == 64
