"""Encrypted rewriting, against deciphering by hand."""

import dataclasses

import numpy as np
import pytest

from instrdiv.runtime.errors import BadInput
from instrdiv.tasks.encrypted import (
    KEPT,
    EncryptedSetting,
    is_no_op,
    plain_rows,
    plain_test_rows,
    rows_of_split,
    training_rows,
)
from instrdiv.tasks.strings.alphabet import LETTERS

SMALL = EncryptedSetting(
    instructions=12, examples=120, keys=4, alphabet_size=10, input_length=8, separator="none", uneven_shape=0.3
)


def parts(row):
    """Key, pattern, replacement and input of a prompt, still encrypted."""
    fields = dict(line.split(":") for line in row.instruction.splitlines() if line != "Answer:")
    assert row.instruction.endswith("\nAnswer:")
    pattern, replacement = fields["Rule"].split(" ->")
    return [text.replace(" ", "") for text in (fields.get("Key", ""), pattern, replacement, fields["Input"])]


def deciphered(key, text, cipher, letters):
    if not key:
        return text
    if cipher == "shift":
        return "".join(letters[(letters.index(c) - letters.index(key)) % len(letters)] for c in text)
    return "".join(letters[key.index(c)] for c in text)


@pytest.mark.parametrize("cipher", ["shift", "substitution"])
@pytest.mark.parametrize("separator", ["none", "space"])
def test_the_answer_follows_the_deciphered_rule(cipher, separator):
    setting = dataclasses.replace(SMALL, cipher=cipher, separator=separator)
    letters = LETTERS[: setting.alphabet_size]
    keys, no_ops = set(), 0
    for row in training_rows(setting, 3):
        key, pattern, replacement, text = parts(row)
        pattern, replacement = (deciphered(key, part, cipher, letters) for part in (pattern, replacement))
        assert row.response.replace(" ", "") == text.replace(pattern, replacement, 1)
        assert is_no_op(row) == (row.response.replace(" ", "") == text)
        assert set(key + pattern + replacement + text) <= set(letters)
        keys.add(key)
        no_ops += pattern not in text
        spaced = row.instruction.split("Input:")[1].split("\n")[0]
        assert spaced == ("".join(f" {c}" for c in text) if separator == "space" else text)
    assert len(keys) == setting.keys, "all keys are used"
    assert letters not in keys and "a" not in keys, "no key leaves the rule plain"
    assert 0.25 < no_ops / setting.examples < 0.55


def test_unseen_rules_are_apart_and_shared_and_fresh():
    def rules(rows, setting):
        letters = LETTERS[: setting.alphabet_size]
        found = [parts(row) for row in rows]
        return [tuple(deciphered(key, part, "shift", letters) for part in rule) for key, *rule, _ in found]

    trained = rules(training_rows(SMALL, 0), SMALL)
    assert len(set(trained)) == SMALL.instructions
    strings = {string for rule in trained for string in rule}
    for split in ("unseen_dev", "unseen"):
        rows = rows_of_split(SMALL, split, 30 if split == "unseen" else 10, 10, seed=0)
        held_out = rules(rows, SMALL)
        assert len(set(held_out)) == len(rows)
        assert not strings & {string for rule in held_out for string in rule}
        assert rows == rows_of_split(dataclasses.replace(SMALL, instructions=5), split, len(rows), 10, seed=7)
    dev, unseen = (rules(rows_of_split(SMALL, split, 10, 10, 0), SMALL) for split in ("unseen_dev", "unseen"))
    assert not set(dev) & set(unseen)
    seen = rows_of_split(SMALL, "seen", 24, 10, seed=0)
    assert set(rules(seen, SMALL)) == set(trained), "each trained rule, in turn"
    assert not {row.instruction for row in seen} & {row.instruction for row in training_rows(SMALL, 0)}


def test_what_is_kept_is_a_part_of_the_whole_set():
    by_way = {way: training_rows(dataclasses.replace(SMALL, kept=way), 1) for way in KEPT}
    assert [len(rows) for rows in by_way.values()] == [120, 60, 60]
    whole = {row.where: row for row in by_way["all"]}
    for rows in by_way.values():
        assert all(whole[row.where] == row for row in rows)
    counts = {way: dataclasses.replace(SMALL, kept=way).rule_counts() for way in KEPT}
    assert set(counts["all"]) == {10} and set(counts["half_even"]) == {5}
    uneven = counts["half_uneven"]
    assert uneven.sum() == 60 and uneven.max() <= 10
    assert uneven.std() > 2 * 1.0, "most dropped examples belong to a few of the rules"


@pytest.mark.parametrize("instructions,examples", [(1, 2), (7, 100), (100, 200), (50, 1001)])
@pytest.mark.parametrize("shape", [0.05, 1.0, 20.0])
def test_uneven_counts_keep_half_and_exceed_no_rule(instructions, examples, shape):
    setting = dataclasses.replace(SMALL, instructions=instructions, examples=examples, uneven_shape=shape)
    most = setting.rule_counts()
    counts = dataclasses.replace(setting, kept="half_uneven").rule_counts()
    assert counts.sum() == examples // 2 and (counts <= most).all() and (counts >= 0).all()


def test_fewer_rules_are_the_first_of_more():
    few, many = (
        {part for row in training_rows(dataclasses.replace(SMALL, instructions=i), 2) for part in [row.where]}
        for i in (4, 12)
    )
    assert few == many  # the same example numbers
    prompts = [
        {
            tuple(deciphered(key, p, "shift", LETTERS[:10]) for p in rule)
            for key, *rule, _ in map(parts, training_rows(dataclasses.replace(SMALL, instructions=i), 2))
        }
        for i in (4, 12)
    ]
    assert prompts[0] < prompts[1]


def test_plain_rows_have_no_key_and_the_same_split():
    trained = plain_rows(dataclasses.replace(SMALL, instructions=50, examples=50), seed=9, count=50)
    tested = plain_test_rows(SMALL, 20, 10)
    unseen = rows_of_split(SMALL, "unseen", 20, 10, 0)
    for row in [*trained, *tested]:
        key, pattern, replacement, text = parts(row)
        assert key == "" and row.response == text.replace(pattern, replacement, 1)
    assert [parts(row)[3] for row in tested] == [parts(row)[3] for row in unseen], "only the cipher is missing"
    strings = {part for row in trained for part in parts(row)[1:3]}
    assert not strings & {part for row in tested for part in parts(row)[1:3]}


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"keys": 10}, "--config.keys=10: must be from 1 to 9"),
        ({"keys": 0}, "--config.keys=0"),
        ({"cipher": "rot13"}, "--config.cipher=rot13: must be one of shift, substitution"),
        ({"kept": "half_even", "instructions": 61}, "--config.examples=120"),
        ({"instructions": 121}, "--config.instructions=121"),
        ({"uneven_shape": -1.0}, "--config.uneven_shape=-1.0"),
        ({"pattern_length": 9}, "--config.pattern_length=9"),
    ],
)
def test_what_cannot_be_is_refused_by_its_flag(changes, words):
    with pytest.raises(BadInput, match=words.replace(".", r"\.")):
        dataclasses.replace(SMALL, **changes).validate()


def test_substitution_keys_differ():
    setting = dataclasses.replace(SMALL, cipher="substitution", alphabet_size=3, keys=5)
    setting.validate()
    found = {tuple(key) for key in setting.cipher_alphabets}
    assert len(found) == 5 and (0, 1, 2) not in found
    assert all(sorted(key) == [0, 1, 2] for key in found)


GOLDEN = ("Key:c\nRule:ifh ->bfh\nInput:cccgdfbc\nAnswer:", "cccjdfbc")
GOLDEN_COUNTS = [10, 5, 0, 3, 1, 10, 10, 0, 0, 1, 10, 10]


def test_rows_are_the_same_everywhere():
    row = training_rows(SMALL, 0)[0]
    assert (row.instruction, row.response) == GOLDEN
    assert np.array_equal(dataclasses.replace(SMALL, kept="half_uneven").rule_counts(), GOLDEN_COUNTS)
