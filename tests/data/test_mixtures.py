"""Mixtures are exact, nested and reproducible; fractions and brute force are the oracle."""

import hashlib
from fractions import Fraction
from itertools import pairwise
from math import ceil, floor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instrdiv.data.mixtures import Mixture, shuffled
from instrdiv.runtime.errors import BadInput

weights = st.lists(st.integers(1, 97), min_size=1, max_size=6)


def mixture(weights, budget):
    return Mixture({f"s{i}": Fraction(weight, sum(weights)) for i, weight in enumerate(weights)}, budget)


def texts(sizes):
    return {f"s{i}": [f"{i}: row {j}" for j in range(size)] for i, size in enumerate(sizes)}


class TestCounts:
    @given(weights, st.integers(1, 400))
    def test_are_the_shares_rounded_and_sum_to_the_budget(self, weights, budget):
        counts = mixture(weights, budget).counts()
        assert sum(counts.values()) == budget
        for weight, count in zip(weights, counts.values(), strict=True):
            exact = Fraction(weight * budget, sum(weights))
            assert floor(exact) <= count <= ceil(exact)

    @given(weights, st.integers(1, 400))
    def test_no_source_loses_a_row_as_the_budget_grows(self, weights, budget):
        # With largest remainders this would fail: in shares 6:6:2, the third source gets 2 of 10 rows, but 1 of 11.
        small, large = mixture(weights, budget).places(), mixture(weights, budget + 1).places()
        assert (large[:-1] == small).all()

    @given(weights, st.integers(1, 3))
    def test_the_sequence_repeats_after_a_period(self, weights, periods):
        total = sum(weights)
        assert list(mixture(weights, total * periods).counts().values()) == [weight * periods for weight in weights]

    def test_of_the_papers(self):
        papers = {"oss": 15_000, "alpaca": 3_000, "cot": 2_000}
        assert Mixture.parse("oss=0.75, alpaca=0.15,cot=0.10", 20_000).counts() == papers
        assert Mixture.parse("oss=15000,alpaca=3000,cot=2000") == Mixture.parse("oss=3/4,alpaca=3/20,cot=.1", 20_000)

    def test_golden(self):
        assert Mixture.parse("a=0.5,b=0.3,c=0.2", 10).places().tolist() == [0, 1, 0, 2, 0, 1, 0, 1, 0, 2]


class TestChoose:
    @settings(max_examples=40)
    @given(weights, st.integers(1, 60), st.integers(0, 60), st.integers(0, 2**32))
    def test_a_larger_budget_begins_with_the_smaller(self, weights, budget, more, seed):
        rows = texts([150] * len(weights))
        small = mixture(weights, budget).choose(rows, seed)
        assert mixture(weights, budget + more).choose(rows, seed)[:budget] == small
        assert len(set(small)) == budget

    @settings(max_examples=40)
    @given(st.lists(weights, min_size=2, max_size=2), st.integers(1, 60), st.integers(0, 9))
    def test_more_rows_of_a_source_contain_fewer_whatever_the_others_do(self, two, budget, seed):
        """A share that is larger by at least two rows also yields more of them."""
        chosen = []
        for weights in two:
            rows = texts([100, *[80 + len(weights)] * (len(weights) - 1)])
            chosen.append([row for name, row in mixture(weights, budget).choose(rows, seed) if name == "s0"])
        fewer, more = sorted(chosen, key=len)
        assert more[: len(fewer)] == fewer
        asked = [Fraction(weights[0] * budget, sum(weights)) for weights in two]
        if asked[1] - asked[0] >= 2:
            assert len(chosen[1]) > len(chosen[0])

    def test_all_rows_of_a_source(self):
        chosen = Mixture.parse("s0=3,s1=5").choose(texts([3, 5]), seed=0)
        assert sorted(chosen) == [("s0", i) for i in range(3)] + [("s1", i) for i in range(5)]


class TestShuffled:
    def test_is_by_a_keyed_hash_of_the_texts(self):
        rows = [f"text {i}" for i in range(50)] + ["süß", "\ud800"]

        def place(i):
            text = rows[i].encode("utf-8", "surrogatepass")
            digest = hashlib.blake2b(text, digest_size=8, key=bytes([7] + 7 * [0]), salt=bytes(8)).digest()
            return int.from_bytes(digest, "little")

        assert shuffled(rows, 7).tolist() == sorted(range(len(rows)), key=place)

    def test_golden(self):
        assert shuffled(["a", "b", "c", "d", "e", "a"], 0).tolist() == [3, 0, 4, 5, 1, 2]

    @given(st.lists(st.text(max_size=3), max_size=30), st.integers(0, 2**64 - 1), st.randoms())
    def test_does_not_depend_on_the_places_of_the_rows(self, rows, seed, random):
        moved = list(rows)
        random.shuffle(moved)
        assert [rows[i] for i in shuffled(rows, seed)] == [moved[i] for i in shuffled(moved, seed)]

    @given(st.lists(st.text(max_size=3), min_size=1, max_size=30, unique=True), st.integers(0, 9))
    def test_a_row_that_goes_leaves_the_order_of_the_others(self, rows, seed):
        gone, *rest = rows
        assert [rest[i] for i in shuffled(rest, seed)] == [rows[i] for i in shuffled(rows, seed) if rows[i] != gone]

    def test_equal_rows_do_not_stay_together(self):
        order = shuffled(["same"] * 20 + [f"other {i}" for i in range(20)], 0)
        same = [place for place, row in enumerate(order) if row < 20]
        assert max(b - a for a, b in pairwise(same)) > 1 and same[-1] - same[0] > 25

    def test_seeds_give_other_orders_that_are_uniform(self):
        first = [shuffled(["a", "b", "c", "d"], seed)[0] for seed in range(400)]
        assert all(65 < first.count(i) < 135 for i in range(4))  # 100 expected, plus or minus four standard deviations


@pytest.mark.parametrize(
    "shares, budget, said",
    [
        ("oss=0.7,alpaca=0.2", 10, "must sum to 1; they sum to 0.9"),
        ("oss=0.7,alpaca", 10, "'alpaca' is not SOURCE=NUMBER"),
        ("oss=0.7,alpaca=x", 10, "'alpaca=x' is not SOURCE=NUMBER"),
        ("oss=1/0", 10, "'oss=1/0' is not SOURCE=NUMBER"),
        ("oss=nan", 10, "'oss=nan' is not SOURCE=NUMBER"),
        ("", None, "'' is not SOURCE=NUMBER"),
        ("=3", None, "'=3' must name a source"),
        ("oss=0", None, "'oss=0' must name a source and an amount of more than 0"),
        ("oss=-1,alpaca=2", 10, "an amount of more than 0"),
        ("oss=1,oss=2", None, "names oss twice"),
        ("oss=0.5", None, "without --budget, these are row counts and must be whole"),
    ],
)
def test_shares_that_make_no_mixture_are_refused_in_one_line(shares, budget, said):
    with pytest.raises(BadInput) as refused:
        Mixture.parse(shares, budget)
    assert said in str(refused.value) and "--shares" in str(refused.value) and "\n" not in str(refused.value)


def test_sources_that_are_not_there_or_too_small_are_named():
    with pytest.raises(BadInput, match="there is no source cot; --data has s0, s1"):
        Mixture.parse("s0=1,cot=1").choose(texts([5, 5]), 0)
    with pytest.raises(BadInput, match="needs 1,200 rows from s1, which has 5"):
        Mixture.parse("s0=1,s1=1200").choose(texts([5, 5]), 0)
