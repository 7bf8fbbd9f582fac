"""Rule tables: distinct, nested, held out by construction, exactly counted."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from instrdiv.tasks.counts import effective_number, rule_counts
from instrdiv.tasks.strings import families
from instrdiv.tasks.strings.alphabet import Alphabet
from instrdiv.tasks.strings.rules import HELD_OUT_PARTS, FamilyTooSmall, RuleSource, StringFamily, resemblance


def source(alphabet=3, longest=3, shortest=None, names=("free",), k=(1, 1), **options):
    strings = StringFamily(alphabet, names, shortest or longest, longest, *k)
    return RuleSource(strings, strings, **options)


def texts(table, alphabet=26):
    return [table.text(row, Alphabet(alphabet)) for row in range(len(table))]


class TestFamilies:
    def expand(self, name, text, k):
        letters = Alphabet(26).encode(text)[None]
        return Alphabet(26).decode(families.FAMILIES[name](letters, k)[0])

    def test_the_papers_examples(self):
        assert self.expand("repeated", "abc", 3) == "aaabbbccc"
        assert self.expand("periodic", "abc", 2) == "abcabc"
        assert self.expand("mirrored", "abc", 3) == "abccbaabc"

    def test_order_one_is_the_string_itself(self):
        assert {self.expand(name, "abca", 1) for name in families.FAMILIES} == {"abca"}

    def test_an_order_divides_the_length(self):
        assert families.orders("repeated", 60, 3, 30) == [3, 4, 5, 6, 10, 12, 15, 20, 30]
        assert families.orders("free", 60, 3, 30) == [1]

    def test_members_of_a_family_have_its_form(self):
        strings = StringFamily(3, ("periodic", "mirrored"), 6, 6, 2, 3)
        expected = set()
        for k in (2, 3):
            for block in itertools.product("abc", repeat=6 // k):
                block = "".join(block)
                expected |= {block * k, "".join(block[::-1] if i % 2 else block for i in range(k))}
        assert {Alphabet(3).decode(string) for string in strings.enumerate()} == expected
        sampled = {pattern for pattern, _ in texts(RuleSource(strings, strings).pool(0, 200))}
        assert sampled <= expected


class TestPools:
    @pytest.mark.parametrize("split", HELD_OUT_PARTS)
    def test_rules_are_distinct_and_change_something(self, split):
        rules = texts(source(longest=3, shortest=1, split=split).pool(0, 150))
        assert len(set(rules)) == 150
        assert all(pattern != replacement for pattern, replacement in rules)

    def test_pools_are_nested(self):
        small, large = source(26, 5).pool(7, 10), source(26, 5).pool(7, 40_000)
        assert texts(small) == texts(large[:10])

    def test_pools_of_different_seeds_differ(self):
        assert texts(source(26, 5).pool(0, 50)) != texts(source(26, 5).pool(1, 50))

    def test_tables_are_the_same_everywhere(self):
        """A golden digest: pools must not change with numpy, Python or machine, or old runs cannot be rebuilt."""
        assert source(26, 20).pool(3, 1000).digest == POOL_DIGEST
        assert source(26, 20).held_out(1000).digest == HELD_OUT_DIGEST

    def test_lengths_cover_their_range(self):
        table = source(26, 4, shortest=2).pool(0, 300)
        assert set(table.pattern_lengths) == set(table.replacement_lengths) == {2, 3, 4}
        assert all(len(pattern) == n for (pattern, _), n in zip(texts(table), table.pattern_lengths, strict=True))

    def test_the_empty_replacement_is_a_rule(self):
        strings, maybe_empty = StringFamily(3, ("free",), 2, 2), StringFamily(3, ("free",), 0, 0)
        assert {r for _, r in texts(RuleSource(strings, maybe_empty, split="pattern").pool(0, 4))} == {""}

    def test_letters_are_uniform(self):
        counts = np.bincount(source(26, 20, split="rule").pool(0, 20_000).patterns.ravel())
        expected = counts.sum() / 26
        assert ((counts - expected) ** 2 / expected).sum() < 60  # chi-squared, 25 degrees: p < 1e-4

    def test_every_rule_of_a_small_family_can_be_had_and_no_more(self):
        small = source(3, 2, split="rule")
        capacity = small.capacity(held_out=False)
        everything = [(x, y) for x in range(9) for y in range(9) if x != y]
        assert capacity + small.capacity(held_out=True) == len(everything)
        assert len(set(texts(small.pool(0, capacity)))) == capacity
        with pytest.raises(FamilyTooSmall, match=rf"{capacity + 1} training rules .* only {capacity}"):
            small.pool(0, capacity + 1)

    @pytest.mark.parametrize("held_out", [False, True])
    def test_a_family_that_has_none_at_all_is_refused_at_once(self, held_out):
        """Twenty letters are too many to list; that the one replacement is on the wrong side is found all the same."""
        empty = StringFamily(26, ("free",), 0, 0)
        rules = RuleSource(StringFamily(26, ("free",), 20, 20), empty)
        wrong = held_out if rules.capacity(held_out) == 0 else not held_out
        with pytest.raises(FamilyTooSmall, match="has only 0"):
            (rules.held_out if wrong else lambda size: rules.pool(0, size))(2)

    def test_a_stream_that_brings_nothing_new_ends(self, monkeypatch):
        """Where counting is given up, asking for too much still ends."""
        monkeypatch.setattr("instrdiv.tasks.strings.rules._ENUMERATE_BELOW", 3)
        with pytest.raises(FamilyTooSmall, match="distinct ones were found"):
            source(3, 2, split="rule").pool(0, 100)

    def test_an_impossible_order_is_refused(self):
        with pytest.raises(ValueError, match=r"no order k in 4\.\.5 divides"):
            source(26, 3, names=("repeated",), k=(4, 5)).pool(0, 1)


WORLDS = st.fixed_dictionaries(
    {
        "alphabet": st.integers(2, 4),
        "longest": st.integers(2, 4),
        "split_seed": st.integers(0, 50),
        "held_out_share": st.floats(0.1, 0.6),
        "names": st.sampled_from([("free",), ("free", "mirrored"), ("repeated", "periodic")]),
    }
)


class TestHeldOut:
    """In worlds small enough to enumerate, all rules of either side are compared."""

    def both_sides(self, world, split):
        """All rules of the training side and of the held-out side; None where there are none, or too many."""
        rules = source(shortest=2, k=(1, 4), split=split, **world)
        counts = [rules.capacity(held_out) for held_out in (False, True)]
        if None in counts or min(counts) == 0 or max(counts) > 8_000:
            return None
        return texts(rules.pool(1, counts[0])), texts(rules.held_out(counts[1]))

    @settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
    @given(WORLDS, st.sampled_from(HELD_OUT_PARTS))
    def test_no_held_out_rule_can_be_trained(self, world, split):
        sides = self.both_sides(world, split)
        assume(sides is not None)
        (patterns, replacements), (held_patterns, held_replacements) = (map(set, zip(*s, strict=True)) for s in sides)
        assert not set(sides[0]) & set(sides[1])
        if split in ("pattern", "pattern_and_replacement"):
            assert not patterns & held_patterns
        if split in ("replacement", "pattern_and_replacement"):
            assert not replacements & held_replacements
        if split == "pattern_and_replacement":  # not even in the other role
            assert not (patterns | replacements) & (held_patterns | held_replacements)

    def test_the_looser_splits_are_looser(self):
        world = {"alphabet": 3, "longest": 3, "split_seed": 1, "held_out_share": 0.3, "names": ("free",)}
        trained, held_out = (dict(zip("pr", map(set, zip(*s, strict=True)), strict=True))
                             for s in self.both_sides(world, "pattern"))  # fmt: skip
        assert trained["r"] & held_out["r"] and not trained["p"] & held_out["p"]

    def test_families_share_one_split(self):
        """A string that two families contain is on the same side in both."""
        free, mirrored = source(3, 4), source(3, 4, names=("mirrored",), k=(2, 2))
        trained = {x for rule in texts(mirrored.pool(0, 20)) for x in rule}
        held_out = {x for rule in texts(free.held_out(free.capacity(True))) for x in rule}
        assert not trained & held_out

    def test_different_split_seeds_split_independently(self):
        """Of strings held out by one seed, the others' share is held out by another, too."""
        sides = [{x for x, _ in texts(source(26, 2, split="pattern", split_seed=s).held_out(3_000))} for s in range(4)]
        for a, b in itertools.combinations(sides, 2):
            assert abs(len(a & b) / len(a) - 0.2) < 0.12

    def test_the_share_is_kept(self):
        rules = source(26, 3, split="pattern", held_out_share=0.25)
        share = rules.capacity(True) / (rules.capacity(True) + rules.capacity(False))
        assert abs(share - 0.25) < 0.02

    def test_held_out_rules_do_not_depend_on_the_seed_of_a_member_but_on_that_of_the_split(self):
        assert texts(source(26, 5).held_out(20)) == texts(source(26, 5).held_out(20))
        assert texts(source(26, 5).held_out(20)) != texts(source(26, 5, split_seed=1).held_out(20))


class TestCounts:
    @given(st.integers(1, 300), st.integers(0, 10_000))
    def test_uniform_counts_differ_by_at_most_one(self, instructions, extra):
        counts = rule_counts(instructions, instructions + extra)
        assert counts.sum() == instructions + extra and counts.max() - counts.min() <= 1

    @settings(deadline=None)
    @given(st.integers(1, 300), st.integers(0, 10_000), st.floats(0.01, 5), st.sampled_from(["weights", "index"]))
    def test_long_tailed_counts_sum_exactly(self, instructions, extra, shape, reading):
        counts = rule_counts(instructions, instructions + extra, shape, reading)
        assert counts.sum() == instructions + extra and counts.min() >= 0

    def test_weights_follow_the_power_law(self):
        """Shares against an independent draw of the same density, by quantiles."""
        counts = rule_counts(2_000, 10**6, tail_shape=0.5)
        weights = np.random.default_rng(0).power(0.5, 10**6)
        expected = np.quantile(weights / weights.mean(), [0.1, 0.5, 0.9])
        assert np.allclose(np.quantile(counts / counts.mean(), [0.1, 0.5, 0.9]), expected, rtol=0.12, atol=0.01)

    def test_large_shapes_tend_to_uniform(self):
        spread = [np.std(rule_counts(1_000, 10**6, shape)) for shape in (0.1, 1.0, 10.0, 1000.0, math.inf)]
        assert spread == sorted(spread, reverse=True) and spread[-1] == 0

    def test_index_reading_is_the_floor_of_a_power(self):
        drawn = np.floor(50 * np.random.default_rng(0).random(10**6) ** (1 / 0.7)).astype(int)
        assert np.allclose(rule_counts(50, 10**6, 0.7, "index"), np.bincount(drawn, minlength=50), rtol=0.05)

    @pytest.mark.parametrize("arguments", [(5, 4), (0, 4), (2, 4, 0.0), (2, 4, 1.0, "other")])
    def test_what_cannot_be_is_refused(self, arguments):
        with pytest.raises(ValueError):
            rule_counts(*arguments)


def test_resemblance_agrees_with_brute_force():
    rules = source(3, 3, split="rule", held_out_share=0.4)
    trained, held_out = rules.pool(0, 30), rules.held_out(12)
    report = resemblance(trained, held_out)
    ours, theirs = texts(trained), texts(held_out)

    def distance(a, b):
        return sum(x != y for x, y in zip(a, b, strict=True))

    nearest = [min(distance(p + r, x + y) for x, y in ours) for p, r in theirs]
    assert report["rule_distance_min"] == min(nearest)
    assert report["rule_distance_mean"] == pytest.approx(np.mean(nearest))
    assert report["pattern_seen"] == pytest.approx(np.mean([p in {x for x, _ in ours} for p, _ in theirs]))
    assert report["replacement_seen"] == pytest.approx(np.mean([r in {y for _, y in ours} for _, r in theirs]))
    assert report["rule_seen"] == 0 and report["compared"] == 12


POOL_DIGEST = "cbf3c3aab8f711aa71944f86288c6f234a1cb6cd17854c1a8a622480910dd992"
HELD_OUT_DIGEST = "4ce810b4619babfbb39e17d2a20db8216110cf52c3c36196fff0c8865e03947f"


class TestEffectiveNumber:
    @given(st.integers(1, 500), st.integers(1, 9))
    def test_equal_counts_are_as_many_as_they_are(self, rules, each):
        assert effective_number(np.full(rules, each)) == pytest.approx(rules)
        assert effective_number(np.append(np.full(rules, each), [0, 0])) == pytest.approx(rules)

    @given(st.lists(st.integers(0, 1000), min_size=2, max_size=50).filter(any))
    def test_is_the_entropy_of_the_examples_rules(self, counts):
        """Counted the other way round: the mean over examples of minus the log of their rule's share."""
        total = sum(counts)
        surprises = [-math.log(count / total) for count in counts for _ in range(count)]
        found = effective_number(np.array(counts))
        assert math.log(found) == pytest.approx(sum(surprises) / total, abs=1e-9)
        assert found + 1e-9 >= 1 and found <= np.count_nonzero(counts) + 1e-6
