"""What ``Task`` provides: drawn instructions, shapes, tokens, words, kinds of error, and how tasks are found."""

import dataclasses
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instrdiv.config.presets import Setting
from instrdiv.config.settings import TAKEN_COLUMNS, TAKEN_PARTS, Member, TaskSetting, setting_of
from instrdiv.config.sizes import SMOKE
from instrdiv.evaluation import rows
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.fields import TABLE, field
from instrdiv.tasks.conditions import Subject, held_out
from instrdiv.tasks.instructions import DrawnSource, Instructions, TooFew, take, take_tests
from instrdiv.tasks.jsonl import JsonLines
from instrdiv.tasks.known import find_task, load_file
from instrdiv.tasks.strings.rewriting import Rewriting
from instrdiv.tasks.task import BUILT_IN, TASKS, Sizes, Task, register, task_of
from instrdiv.tasks.tokens import END, FIRST_TOKEN, PAD, SEPARATOR, answer_tokens, blank_instruction, prompt_tokens
from tests.tasks.letter_order import LetterOrder, Orders

A_FEW = settings(max_examples=40, deadline=None)


def orders_of(table) -> list[tuple[int, ...]]:
    return [tuple(map(int, row)) for row in table.letters]


class TestDrawnSource:
    def test_a_seeds_pools_are_nested_and_distinct(self):
        source = LetterOrder().source
        assert isinstance(source, DrawnSource)
        largest = orders_of(source.pool(3, 300))
        assert len(set(largest)) == 300 and all(sorted(order) == list(range(6)) for order in largest)
        for size in (0, 1, 7, 299):
            assert orders_of(source.pool(3, size)) == largest[:size]
        assert orders_of(source.held_out(100)[:40]) == orders_of(source.held_out(40))

    def test_seeds_have_pools_of_their_own_and_held_out_ones_are_shared(self):
        source = LetterOrder(letters=9).source
        pools = [orders_of(source.pool(seed, 200)) for seed in range(3)]
        for one, other in itertools.combinations(pools, 2):
            assert one != other and len(set(one) & set(other)) < 20

    @pytest.mark.parametrize("share", [0.05, 0.2, 0.7])
    def test_one_side_or_the_other_for_ever(self, share):
        """Each of all 720 orders is either for training or held out, regardless of seed, size and other fields."""
        source = LetterOrder(held_out_share=share).source
        apart = set(orders_of(source.held_out(int(720 * share * 0.7))))
        for seed, size in ((0, 10), (1, 100), (2**31 - 1, int(720 * (1 - share) * 0.7))):
            assert not apart & set(orders_of(source.pool(seed, size)))
        other = LetterOrder(held_out_share=share, backward=True, longest=9, shortest=2, same_share=0.5).source
        assert not apart & set(orders_of(other.pool(5, 20))), "other fields change the draws, not the side"
        everything = Orders(np.array(list(itertools.permutations(range(6))), np.uint8))
        held_out = source._is_held_out(everything)
        assert abs(held_out.mean() - share) < 5 * (share * (1 - share) / 720) ** 0.5
        assert apart <= set(orders_of(everything[held_out]))
        whole = set(orders_of(source.pool(0, int((~held_out).sum()))))
        assert whole == set(orders_of(everything[~held_out])), "every order of a side is eventually drawn"

    def test_the_splits_seed_moves_the_split(self):
        everything = Orders(np.array(list(itertools.permutations(range(6))), np.uint8))
        sides = [LetterOrder(split_seed=seed).source._is_held_out(everything) for seed in (0, 1, 2**30 - 1)]
        assert len({side.tobytes() for side in sides}) == 3

    def test_tests_are_apart_and_traced_fields_change_nothing(self):
        source = LetterOrder().source
        dev, final = map(orders_of, source.tests(30, 50))
        assert len(set(dev + final)) == 80 and dev + final == orders_of(source.held_out(80))
        setting = SMOKE.with_task(LetterOrder(same_share=0.3, shortest=2))
        assert setting.source == source and hash(setting.source) == hash(source)
        assert SMOKE.with_task(LetterOrder(letters=7)).source != source
        assert SMOKE.with_task(LetterOrder(held_out_share=0.3)).source != source

    def test_instructions_are_the_same_for_ever(self):
        """Golden values: a run that is resumed in a year still trains on the same instructions."""
        source = LetterOrder().source
        assert source.pool(0, 64).digest == GOLDEN["pool"]
        assert source.pool(1, 64).digest == GOLDEN["other seed"]
        assert source.held_out(64).digest == GOLDEN["held out"]
        assert len(source.none()) == 0 and source.none().letters.shape == (0, 6)

    def test_too_few_is_one_line_that_names_a_flag_and_a_remedy(self):
        source = LetterOrder(letters=3).source  # 6 orders
        with pytest.raises(TooFew, match=r"^7 training instructions were requested, but only [1-6] distinct ones"):
            source.pool(0, 7)
        with pytest.raises(BadInput, match=r"^--config.held_out_share=0.2: 7 training.*lower --config.instr"):
            take(source, 7, seed=0)
        for refused in (lambda: take(source, 7, None), lambda: take_tests(source, 3, 4)):
            with pytest.raises(BadInput, match=r"7 held-out instructions.*raise --config\.held_out_share") as error:
                refused()
            assert "\n" not in str(error.value)
        assert len(take(source, 1, seed=0)) == 1


#: SHA-256 of pools and held-out instructions of ``LetterOrder()``.
GOLDEN = {
    "pool": "4bb2c53246c7fd96b693372505cfd62eecd995ec453ac160a64a1568e23900d0",
    "other seed": "2805b118629e90fedb075b6d178851a2a2e92eb19bb98b1ee24c4b3116ee5fb6",
    "held out": "7a0af8217a09a63d3b4979c60322476e8037dd4f78ee39095a8f3d6470938554",
}


@dataclasses.dataclass(frozen=True)
class Pairs(Instructions):
    """Two arrays of different dtypes."""

    words: np.ndarray
    lengths: np.ndarray


def pairs(*rows: tuple[list[int], int]) -> Pairs:
    return Pairs(np.array([w for w, _ in rows], np.uint8), np.array([n for _, n in rows], np.int32))


class TestInstructions:
    table = pairs(([1, 2], 7), ([1, 2], 8), ([2, 1], 7), ([1, 2], 7))

    def test_rows_are_taken_by_any_index(self):
        assert len(self.table) == 4 and len(self.table[:0]) == 0
        for index in (slice(1, 3), [2, 0], np.array([3, 3]), self.table.lengths == 7):
            taken = self.table[index]
            assert isinstance(taken, Pairs)
            assert taken.words.tolist() == self.table.words[index].tolist()
            assert taken.lengths.tolist() == self.table.lengths[index].tolist()

    def test_tables_are_joined_end_to_end(self):
        joined = self.table[:1].joined([self.table[1:3], self.table[3:]])
        assert joined.digest == self.table.digest and self.table.joined([]).digest == self.table.digest

    def test_keys_are_equal_for_equal_ones_alone(self):
        keys = self.table.keys()
        equal = [[bool(a == b) for b in keys] for a in keys]
        rows = list(zip(self.table.words.tolist(), self.table.lengths.tolist(), strict=True))
        assert equal == [[a == b for b in rows] for a in rows]
        assert len(np.unique(keys)) == 3 and len(self.table[:0].keys()) == 0
        assert np.isin(self.table[:2].keys(), self.table[3:].keys()).tolist() == [True, False]

    def test_a_digest_tells_order_shape_and_value(self):
        others = [self.table[::-1], self.table[:3], pairs(([1, 2], 7), ([1, 2], 8), ([2, 1], 7), ([1, 2], 9))]
        reshaped = Pairs(self.table.words.reshape(2, 4), self.table.lengths)
        digests = [table.digest for table in (self.table, *others, reshaped)]
        assert len(set(digests)) == 5 and all(len(digest) == 64 for digest in digests)
        assert Pairs(np.asfortranarray(self.table.words), self.table.lengths).digest == self.table.digest

    def test_the_device_gets_the_fields_by_name(self):
        assert list(self.table.arrays()) == ["words", "lengths"] and self.table.arrays()["words"] is self.table.words


@dataclasses.dataclass(frozen=True)
class Wider(Sizes):
    """Sizes with a task-specific one, on which the prompt may depend."""

    order: int = 4


class TestCommonShape:
    @given(st.lists(st.tuples(*[st.integers(1, 30)] * 3, st.booleans(), st.integers(1, 9)), min_size=1, max_size=4))
    @A_FEW
    def test_it_is_the_largest_of_each_and_ragged_where_prompts_differ(self, shapes):
        made = [Sizes(v, p, a, ragged, size) for v, p, a, ragged, size in shapes]
        common = Task.common_shape(made)
        assert isinstance(common, Sizes) and common.sequence == common.prompt + common.answer + 1
        for place, name in enumerate(("vocabulary", "prompt", "answer")):
            assert getattr(common, name) == max(shape[place] for shape in shapes)
        assert common.instruction_bytes == max(shape[4] for shape in shapes)
        assert common.ragged == (any(shape[3] for shape in shapes) or len({shape[1] for shape in shapes}) > 1)

    def test_one_shape_is_itself(self):
        assert Task.common_shape([Sizes(9, 5, 3)]) == Sizes(9, 5, 3)

    def test_sizes_of_a_tasks_own_are_not_mixed(self):
        """Only the task knows how to combine them; if one shape covers all others, it is the common one."""
        small, large = Wider(9, 5, 3), Wider(9, 7, 3, order=6)
        assert Task.common_shape([small, small]) == small
        assert Task.common_shape([small, large]) == dataclasses.replace(large, ragged=True)
        with pytest.raises(NotImplementedError, match="common_shape: define a shape"):
            Task.common_shape([Wider(9, 7, 3, order=2), Wider(9, 5, 3, order=6)])


class TestTokens:
    @pytest.mark.parametrize("sizes", [(3,), (0, 4), (2, 3), (1, 2, 5)])
    def test_a_prompt_is_its_parts_each_with_a_separator_at_the_right(self, sizes):
        full, cut = jax.jit(lambda *parts: prompt_tokens(parts)), jax.jit(prompt_tokens)

        @given(st.data())
        @A_FEW
        def check(data):
            parts = [data.draw(st.lists(st.integers(0, 300), min_size=n, max_size=n)) for n in sizes]
            arrays = [np.array(part, np.int32) for part in parts]
            whole, none = full(*arrays)
            assert whole.tolist() == spelled(parts) and int(none) == 0
            lengths = [data.draw(st.integers(0, n)) for n in sizes]
            prompt, padding = cut(arrays, [np.int32(n) for n in lengths])
            short = spelled([part[:n] for part, n in zip(parts, lengths, strict=True)])
            width = sum(sizes) + len(sizes)
            assert prompt.tolist() == [PAD] * (width - len(short)) + short and int(padding) == width - len(short)

        check()

    def test_small_types_do_not_wrap(self):
        parts = (jnp.array([255, 0], jnp.uint8), jnp.array([254], jnp.uint8))
        assert prompt_tokens(parts)[0].tolist() == [258, 3, SEPARATOR, 257, SEPARATOR]
        assert prompt_tokens(parts, (2, 1))[0].tolist() == [258, 3, SEPARATOR, 257, SEPARATOR]

    def test_an_answer_ends_and_is_padded(self):
        made = jax.jit(answer_tokens)

        @given(st.lists(st.integers(0, 300), min_size=5, max_size=5), st.integers(0, 5))
        @A_FEW
        def check(letters, length):
            tokens, mask = made(np.array(letters, np.int32), np.int32(length))
            right = [FIRST_TOKEN + letter for letter in letters[:length]] + [END]
            assert tokens.tolist() == right + [PAD] * (5 - length)
            assert mask.tolist() == [True] * len(right) + [False] * (5 - length)

        check()

    def test_blanked_prompts_keep_separators_and_the_input(self):
        blanked = jax.jit(blank_instruction)

        @given(st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=3))
        @A_FEW
        def check(parts):
            padding = [PAD] * (15 - len(spelled(parts)))
            *instruction, last = parts
            blank = [token for part in instruction for token in [PAD] * len(part) + [SEPARATOR]]
            prompt = np.array(padding + spelled(parts), np.int32)
            assert blanked(prompt).tolist() == padding + blank + spelled([last])

        check()


def spelled(parts) -> list[int]:
    """The prompt of these parts in plain Python."""
    return [token for part in parts for token in [*(FIRST_TOKEN + letter for letter in part), SEPARATOR]]


ALPHABET = "abcdef"


class TestWords:
    task = LetterOrder()

    @given(st.text(ALPHABET, max_size=6), st.text(ALPHABET, max_size=6), st.text(ALPHABET, max_size=6), st.data())
    @A_FEW
    def test_a_row_is_read_back_as_it_was_written(self, order, word, answer, data):
        tokens = {c: i for i, c in enumerate(self.task.characters)}
        left, right = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
        row = "_" * left + f"{order}#{word}#{answer}$" + "_" * right
        row = np.array([tokens[c] for c in row])
        assert self.task.words(row) == {"order": order, "word": word, "answer": answer}
        assert self.task.text(row[left : left + len(order)]) == order

    def test_a_task_says_its_instruction_in_one_line(self):
        assert LetterOrder.instruction_words({"order": "abc", "word": "b"}) == "abc"
        assert LetterOrder.instruction_words({"order": "", "word": "b"}) == "(nothing)"
        row = {"pattern": "ab", "replacement": "", "input": "xabx"}
        assert Rewriting.instruction_words(row, "→") == "ab → (nothing)"
        assert LetterOrder.site({"order": "abc", "word": "b"}) == ("b", "", "")

    @pytest.mark.parametrize("task", [LetterOrder(), LetterOrder(shortest=1), Rewriting()])
    def test_examples_of_the_device_read_as_what_they_are(self, task):
        """Characters and tokens correspond one to one; a row fits its shape."""
        shape, key = task.shape, jax.random.key(0)
        assert len(set(task.characters)) == len(task.characters) == shape.vocabulary
        rule = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), take(task.source, 1, 0).arrays())
        example = jax.jit(task.example, static_argnums=0)(shape, task.knobs(), rule, key)
        tokens = np.asarray(example.tokens)
        assert len(tokens) == shape.sequence and tokens.max() < shape.vocabulary
        assert len(example.loss_mask) == shape.answer + 1 and (tokens[: example.padding] == PAD).all()
        words = task.words(tokens)
        assert tuple(words) == (*task.parts, "answer")
        assert (tokens[shape.prompt :] != PAD).tolist() == example.loss_mask.tolist()
        assert tokens[shape.prompt - 1] == SEPARATOR


class TestClassify:
    @given(st.lists(st.tuples(*[st.lists(st.integers(3, 5), max_size=3)] * 2, st.data()), min_size=1, max_size=8))
    @A_FEW
    def test_against_brute_force(self, answers):
        """Tokens after the end do not matter; an answer without an end has the wrong length."""
        right, decoded, expected = [], [], []
        for a, b, data in answers:
            rows = [[*row, END, *data.draw(st.lists(st.integers(0, 5), min_size=3, max_size=3))] for row in (a, b)]
            right.append(rows[0][:4])
            if data.draw(st.booleans()):
                b = [*b, 3, 3, 3, 3][:4]
                rows[1] = b
            decoded.append(rows[1][:4])
            expected.append("right" if a == b else "wrong length" if len(a) != len(b) else "wrong token")
        found = Task.classify(None, None, np.array(right), np.array(decoded))
        assert found.dtype == np.int8
        assert ["right" if kind < 0 else Task.mistakes[kind] for kind in found] == expected


def test_held_out_instructions_that_were_trained_or_come_twice_are_not_tested():
    trained, tested = pairs(([1, 1], 1), ([2, 2], 2)), pairs(([3, 3], 3), ([2, 2], 2), ([3, 3], 3), ([0, 0], 0))
    assert Task.testable(trained, tested).lengths.tolist() == [3, 0]
    assert Task.resemblance(trained, tested, 2) == {"trained": 2, "held_out": 4, "instruction_seen": 0.25}
    assert Task.relation(trained, tested).shape == (4, 0)


class TestHeldOut:
    """Tests of the held-out suite, for a task whose instructions are drawn."""

    def subject(self, tests=16, dev_tests=16, **changes):
        own = SMOKE.with_task(LetterOrder(), instructions=4)
        member = Member(own, 0)
        return Subject(member, dataclasses.replace(own, **changes), member.setting.source.pool(0, 4), dev_tests, tests)

    @pytest.mark.parametrize("changes", [{}, {"longest": 9}, {"backward": True}])
    def test_none_that_was_tuned_on_is_tested(self, changes):
        subject = self.subject(**changes)
        tuned_on = take_tests(subject.member.setting.source, 16, 0)[0]
        tested = held_out(subject)
        assert len(tested) == 16 and not {*orders_of(tested)} & {*orders_of(tuned_on)}
        if not changes:
            assert orders_of(tested) == orders_of(take_tests(subject.setting.source, 16, 16)[1])

    def test_as_many_as_there_are_are_tested(self):
        """Of 720 orders, 128 are held out."""
        for changes in ({}, {"longest": 9}):
            tested = held_out(self.subject(tests=2000, **changes))
            assert 90 < len(tested) < 160 and len({*orders_of(tested)}) == len(tested)


def test_a_subjects_trained_instructions_are_those_with_an_example():
    setting = SMOKE.with_task(LetterOrder(), instructions=40, examples=64, tail_shape=0.02)
    member = Member(setting, 0)
    pool = take(setting.source, 40, 0)
    trained = Subject(member, setting, pool, 4, 4).trained
    assert 0 < len(trained) < 40
    assert orders_of(trained) == [
        order for order, count in zip(orders_of(pool), member.rule_counts(), strict=True) if count
    ]


class TestTasks:
    @pytest.fixture(autouse=True)
    def _restored(self, monkeypatch):
        monkeypatch.setattr("instrdiv.tasks.task.TASKS", TASKS.copy())

    def test_two_tasks_of_one_name_are_refused(self):
        from instrdiv.tasks import task

        class Impostor(Task):
            name = "letter_order"

        with pytest.raises(ValueError, match="Impostor: the name letter_order is taken"):
            register(Impostor)
        assert register(LetterOrder) is LetterOrder, "registering the same task twice, as when a file is loaded twice"
        assert task.TASKS["letter_order"] is LetterOrder

        class Nameless(LetterOrder):
            pass

        with pytest.raises(ValueError, match="Nameless: a task needs a name"):
            register(Nameless)

    def test_the_names_of_this_packages_tasks_are_taken(self):
        @dataclasses.dataclass(frozen=True)
        class Impostor(Task):
            name = "jsonl"

        with pytest.raises(ValueError, match=r"Impostor: the name jsonl is taken by the task in instrdiv\.tasks"):
            register(Impostor)

    @pytest.mark.parametrize(
        "made, said",
        [
            ({"field": ("width", field(5, "letters", kind=TABLE))}, "the name width is reserved"),
            ({"field": ("seed", field(7, "of a shuffle", kind=TABLE))}, "the name seed is reserved"),
            ({"field": ("steps", field(7, "of a machine", kind=TABLE))}, "the name steps is reserved"),
            ({"parts": ("order", "decoded")}, "the name decoded is reserved"),
            ({"field": ("letters", field(5, "letters"))}, "field letters needs a kind"),
            ({"field": ("letters", 5)}, "field letters needs a kind"),
        ],
        ids=["shared field", "column", "property", "part", "no kind", "no field"],
    )
    def test_fields_and_parts_have_names_of_their_own_and_a_kind(self, made, said):
        of_class = {"name": "odd", "__annotations__": {}}
        if "field" in made:
            name, value = made["field"]
            of_class |= {name: value, "__annotations__": {name: "int"}}
        if "parts" in made:
            of_class["parts"] = made["parts"]
        odd = dataclasses.dataclass(frozen=True)(type("Odd", (Task,), of_class))
        with pytest.raises(ValueError, match=f"^Odd: {said}"):
            setting_of(odd)

    def test_no_column_of_the_tables_is_left_to_tasks(self):
        assert {*rows.IDENTITY, *rows.DERIVED, *rows.ERROR_COLUMNS} <= {*TAKEN_COLUMNS, "error", "count"}
        assert {*rows.sample_columns(LetterOrder)} <= {*TAKEN_COLUMNS, *TAKEN_PARTS, *LetterOrder.parts}

    def test_a_table_says_what_it_is_about_by_its_columns(self):
        for setting in (Setting(), SMOKE.with_task(LetterOrder()), SMOKE.with_task(JsonLines())):
            row = {"figure": "x", "exact_match": 1.0} | setting.as_row()
            assert task_of(row) is type(setting).task_type()
        assert task_of(["figure", "exact_match", *SMOKE.columns()]) is Task
        older = [name for name in Setting().as_row() if name != "near_miss_fraction"]
        assert task_of(older) is Rewriting, "a table written before a field was added"

    def test_of_two_tasks_that_share_columns_the_one_without_missing_ones_is_meant(self):
        from instrdiv.runtime.fields import TABLE, field

        def made(name, *columns):
            fields = [(column, int, field(1, "a number", kind=TABLE)) for column in columns]
            return register(
                dataclasses.make_dataclass(name, fields, bases=(Task,), namespace={"name": name}, frozen=True)
            )

        more, fewer = made("more", "one", "two", "three"), made("fewer", "one", "two")
        assert task_of(["one", "two"]) is fewer and task_of(["one", "two", "three"]) is more

    def test_settings_of_a_task_are_one_class(self):
        made = setting_of(LetterOrder)
        assert made is setting_of("letter_order") and issubclass(made, (LetterOrder, TaskSetting))
        assert made.__name__ == "LetterOrderSetting" and made.task_type() is LetterOrder
        assert setting_of("rewriting") is Setting and Setting.task_type() is Rewriting
        with pytest.raises(KeyError):
            setting_of("no such task")

    def test_a_size_with_a_task_keeps_both(self):
        setting = SMOKE.with_task(LetterOrder(letters=4, same_share=0.25), width=64, held_out_share=0.3)
        assert type(setting) is setting_of(LetterOrder)
        assert (setting.letters, setting.same_share, setting.held_out_share) == (4, 0.25, 0.3)
        shared = {f.name for f in dataclasses.fields(TaskSetting)} - {"width", "held_out_share"}
        assert all(getattr(setting, name) == getattr(SMOKE, name) for name in shared) and setting.width == 64
        assert setting.own_task() == LetterOrder(letters=4, held_out_share=0.3)
        again = type(setting).from_row(setting.as_row())
        assert again.as_row() == setting.as_row() and Member(again, 1).id == Member(setting, 1).id
        setting.validate()
        with pytest.raises(BadInput, match=r"^--config\.shortest=9: must be in 1\.\.5"):
            dataclasses.replace(setting, shortest=9, longest=5).validate()

    def test_every_task_is_found_by_its_name(self):
        assert {name: find_task(name) for name in BUILT_IN} == {"rewriting": Rewriting, "jsonl": JsonLines}
        assert find_task("letter_order") is LetterOrder and find_task("no such task") is None


class TestLoadFile:
    TASK = "from instrdiv.tasks.task import Task, register\n@register\nclass Mine(Task):\n    name = 'of_a_file'\n"

    @pytest.fixture(autouse=True)
    def _restored(self):
        modules, tasks = set(sys.modules), dict(TASKS)
        yield
        for name in set(sys.modules) - modules:
            del sys.modules[name]
        TASKS.clear()
        TASKS.update(tasks)

    def test_its_tasks_are_known_and_it_is_imported_once(self, tmp_path, monkeypatch):
        file = tmp_path / "my_task_file.py"
        file.write_text(self.TASK)
        module = load_file(str(file))
        assert find_task("of_a_file") is module.Mine and "my_task_file" not in sys.modules
        monkeypatch.chdir(tmp_path)
        assert load_file("my_task_file.py") is module

    def test_a_launcher_that_is_imported_already_is_taken_as_it_is(self):
        """For example, in a notebook that imports a task and then calls ``experiments.evaluate`` with ``--task``."""
        module = sys.modules[LetterOrder.__module__]
        assert load_file(module.__file__) is module and find_task("letter_order") is LetterOrder

    def test_two_files_with_one_name_are_two_modules(self, tmp_path):
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "task.py").write_text(self.TASK)
        load_file(str(tmp_path / "a" / "task.py"))
        with pytest.raises(BadInput, match=r"the name of_a_file is taken by the task in .*/a/task\.py"):
            load_file(str(tmp_path / "b" / "task.py"))

    @pytest.mark.parametrize(
        "name, text, words",
        [
            ("absent.py", None, "there is no such file"),
            ("words.txt", "a task", "is not a Python file"),
            ("broken_syntax.py", "class Task(:\n", "cannot be imported (SyntaxError: "),
            ("broken_import.py", "import no_such_module\n", "cannot be imported (ModuleNotFoundError: No module named"),
            ("broken_field.py", "raise ValueError('one\\ntwo')\n", "cannot be imported (ValueError: one"),
            ("leaves.py", "import sys\nsys.exit('bye')\n", "cannot be imported (SystemExit: bye"),
        ],
    )
    def test_a_mistake_is_one_line_that_names_the_file(self, tmp_path, name, text, words):
        file = tmp_path / name
        if text is not None:
            file.write_text(text)
        with pytest.raises(BadInput) as error:
            load_file(str(file))
        said = str(error.value)
        assert said.startswith(f"--task={file}: ") and words in said and "\n" not in said
        assert not {file.stem, str(file.resolve())} & set(sys.modules)

    def test_a_file_does_not_stand_in_for_another_module(self, tmp_path):
        """A task in ``json.py`` must not replace the standard ``json`` module."""
        import json

        (tmp_path / "json.py").write_text(self.TASK)
        load_file(str(tmp_path / "json.py"))
        assert sys.modules["json"] is json
