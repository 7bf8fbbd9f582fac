import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instrdiv.data.packing import REPORT_COLUMNS, Example, pack, prompt_tokens, tokenize
from instrdiv.data.schemas import TextRow
from instrdiv.data.templates import make_template
from instrdiv.data.tokenizer import Tokenizer, character_tokenizer, write_tokenizer
from instrdiv.models import llama
from instrdiv.models.llama import Model
from instrdiv.runtime.errors import BadInput
from tests import adapters as worlds
from tests.tokenizers import byte_level, sentencepiece_like

pytest.importorskip("tokenizers")

ROWS = [
    TextRow("Add 1 and 2.", "The answer is 3.", "a", "a: 1"),
    TextRow("Answer the question.\n", "\n\nNo.\n", "a", "a: 2", input="Is it 3?", system="Be brief."),
    TextRow("Who?", "The fox", "b", "b: 1", turns=(("And who else?", "the lazy dog é\n"), ("Why?", " So."))),
]


@pytest.fixture(scope="module")
def characters(tmp_path_factory):
    path = tmp_path_factory.mktemp("characters")
    write_tokenizer(path, character_tokenizer("abcdefgh?", ("_", "$")), eos_token="$", pad_token="_")
    return Tokenizer.load(path)


def test_the_loss_is_on_the_response_and_its_end_token_by_token(characters):
    rows = [TextRow("ab?", "ba", "x", "x: 1"), TextRow("c?", "d", "y", turns=(("ee?", "fgh"), ("?", "a")))]
    first, second = tokenize(rows, make_template("plain", characters), characters)

    def shown(example):
        letters = [characters.token(token) for token in example.tokens]
        return "".join(x.upper() if loss else x for x, loss in zip(letters, example.loss_mask, strict=True))

    assert shown(first) == "ab?BA$" and list(first.loss_mask) == [0, 0, 0, 1, 1, 1]
    assert shown(second) == "c?D$ee?FGH$?A$" and second.loss_mask.sum() == 2 + 4 + 2
    assert (first.source, first.where, first.tokens.dtype, first.loss_mask.dtype) == ("x", "x: 1", np.int32, bool)


@pytest.mark.parametrize("template", ["alpaca", "llama2", "plain", "chatml"])
@pytest.mark.parametrize(
    "kind", [byte_level, sentencepiece_like, lambda path: sentencepiece_like(path, metaspace=True)]
)
def test_prompt_and_response_have_the_tokens_of_generation(tmp_path, kind, template):
    """Transformers is the oracle: it tokenizes the prompt alone, as for generation, and decodes the rest."""
    transformers = pytest.importorskip("transformers")
    path = kind(tmp_path / "checkpoint")
    ours, theirs = Tokenizer.load(path), transformers.AutoTokenizer.from_pretrained(path)
    if template == "chatml" and ours.token_id("<|im_end|>") is None:
        return
    made = make_template(template, ours)
    for row, example, prompt in zip(ROWS, tokenize(ROWS, made, ours), prompt_tokens(ROWS, made, ours), strict=True):
        assert prompt == theirs(made.prompt(row)).input_ids
        pairs = zip(example.tokens.tolist(), example.loss_mask, strict=True)
        runs = [(loss, [token for token, _ in run]) for loss, run in itertools.groupby(pairs, lambda pair: pair[1])]
        assert runs[0] == (False, prompt) and [loss for loss, _ in runs] == [False, True] * (1 + len(row.turns))
        end = "<|im_end|>" if template == "chatml" else theirs.eos_token
        for (_, ids), response in zip(runs[1::2], (row.response, *(said for _, said in row.turns)), strict=True):
            assert theirs.convert_ids_to_tokens(ids)[-1] == end
            around = " " if template == "llama2" else ""
            # Decoded after a token that does not end with a space, which keeps the first space of the response.
            before = theirs("x", add_special_tokens=False).input_ids
            assert theirs.decode(before + ids).removeprefix("x") == f"{around}{response}{around}{end}"


def test_a_text_that_begins_itself_gets_no_second_beginning(tmp_path):
    """A chat template decides whether to write the bos token; for a named format the tokenizer adds it."""
    tokenizer, row = Tokenizer.load(byte_level(tmp_path / "byte")), [TextRow("Who?", "The fox")]
    begin = tokenizer.token_id("<|begin|>")
    for bos, times in (("{{ bos_token }}", 1), ("", 0)):
        path = tmp_path / "own.jinja"
        path.write_text(bos + "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}")
        template = make_template(str(path), tokenizer)
        (example,), (prompt,) = tokenize(row, template, tokenizer), prompt_tokens(row, template, tokenizer)
        assert example.tokens.tolist().count(begin) == prompt.count(begin) == times
    (example,) = tokenize(row, make_template("plain", tokenizer), tokenizer)
    assert example.tokens.tolist().count(begin) == 1 and example.tokens[0] == begin


def test_written_special_tokens_are_noticed(tmp_path):
    tokenizer = Tokenizer.load(byte_level(tmp_path / "byte"))
    rows = [TextRow("a", "b"), TextRow("a", "b <|end|> c"), TextRow("a", "b", turns=(("<|pad|>", "c"),))]
    examples = list(tokenize(rows, make_template("alpaca", tokenizer), tokenizer))
    assert [example.has_special_tokens for example in examples] == [False, True, True]


def test_rows_that_have_no_tokens(characters):
    template = make_template("plain", characters)
    with pytest.raises(BadInput, match="x: 7: the tokenizer cannot encode a text"):
        list(tokenize([ROWS[0], TextRow("ab", "z", where="x: 7")][1:], template, characters))
    with pytest.raises(BadInput, match="x: 8: the prompt is empty"):
        list(tokenize([TextRow("", "a", where="x: 8")], template, characters))


@st.composite
def examples(draw):
    """Examples of alternating prompts and responses; all tokens are distinct, so none can be mistaken for another."""
    made, number = [], itertools.count(1)
    for i in range(draw(st.integers(1, 25))):
        runs = draw(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 9)), min_size=1, max_size=3))
        mask = np.concatenate([[loss] * size for run in runs for loss, size in zip((False, True), run, strict=True)])
        tokens = np.array([next(number) for _ in mask], np.int32)
        made.append(Example(tokens, mask, draw(st.sampled_from("xyz")), f"row {i}"))
    return made


@given(examples(), st.integers(6, 40), st.booleans())
@settings(max_examples=200, deadline=None)
def test_nothing_is_lost_but_what_the_report_says(made, length, several):
    kept = [example for example in made if example.loss_mask[:length].any()]
    if not kept:
        with pytest.raises(BadInput, match=f"--max_length={length}: truncation leaves no response token"):
            pack(made, length, 0, several)
        return
    packed, report = pack(iter(made), length, 0, several)
    found = []
    for row in range(len(packed.tokens)):
        segments = packed.segments[row]
        size = int((segments > 0).sum())
        assert (segments[:size] > 0).all() and (np.diff(segments[:size]) >= 0).all()  # filled from the left
        assert set(segments[:size]) == set(range(1, segments.max() + 1))
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            assert (packed.positions[row, here] == np.arange(here.sum())).all()
            (source,) = set(packed.sources[row, here])
            found.append((packed.tokens[row, here].tolist(), packed.loss_mask[row, here].tolist(),
                          packed.source_names[source]))  # fmt: skip
        padding = segments == 0
        assert (packed.tokens[row, padding] == 0).all() and (packed.sources[row, padding] == -1).all()
        assert not packed.loss_mask[row, padding].any() and not packed.positions[row, padding].any()
    expected = [(e.tokens[:length].tolist(), e.loss_mask[:length].tolist(), e.source) for e in kept]
    assert sorted(found) == sorted(expected)
    # Rows, and the examples within each row, keep the order of the input.
    order = iter([expected.index(example) for example in found])
    rows = [[next(order) for _ in range(segments.max())] for segments in packed.segments]
    assert rows == sorted(map(sorted, rows))
    if several:  # no two rows would fit into one
        filled = (packed.segments > 0).sum(1)
        assert all(a + b > length for a, b in itertools.combinations(filled, 2))
    else:
        assert found == expected and packed.segments.max() == 1
    total = report.table[-1]
    assert total["source"] == "all" and tuple(total) == REPORT_COLUMNS and all(
        sum(row[name] for row in report.table[:-1]) == total[name] for name in REPORT_COLUMNS[1:] if name != "longest"
    )  # fmt: skip
    assert total["examples"] == len(kept) and total["dropped"] == len(made) - len(kept)
    assert total["truncated"] == sum(len(e.tokens) > length for e in kept)
    assert total["response_tokens"] == packed.loss_mask.sum()
    assert total["response_tokens"] + total["response_tokens_lost"] == sum(int(e.loss_mask.sum()) for e in made)
    assert total["tokens"] == (packed.segments > 0).sum() and report.efficiency == total["tokens"] / packed.tokens.size
    assert total["longest"] == max(len(e.tokens) for e in made)


def test_the_report_in_words_and_the_same_rows_again(characters):
    rows = [TextRow("ab?", "ba" * n, "xy"[n % 2]) for n in range(1, 30)]
    template = make_template("plain", characters)
    packed, report = pack(tokenize(rows, template, characters), 32, characters.pad_id)
    assert "xy"[::-1] == "".join(packed.source_names)  # in the order of their first examples
    assert report.text.splitlines() == [
        "y: 15 examples, 382 tokens, 337 of them in responses; longest example: 62 tokens",
        "  limit of 32 tokens: 8 examples truncated, 0 dropped, 128 response tokens lost",
        "x: 14 examples, 364 tokens, 322 of them in responses; longest example: 60 tokens",
        "  limit of 32 tokens: 7 examples truncated, 0 dropped, 112 response tokens lost",
        "all sources: 29 examples, 746 tokens, 659 of them in responses; longest example: 62 tokens",
        "  limit of 32 tokens: 15 examples truncated, 0 dropped, 240 response tokens lost",
        f"{len(packed.tokens)} rows of 32 tokens, {report.efficiency:.1%} full",
    ]
    again, _ = pack(tokenize(rows, template, characters), 32, characters.pad_id)
    jax.tree.map(np.testing.assert_array_equal, dataclasses.astuple(packed)[:5], dataclasses.astuple(again)[:5])


def test_packing_fills_the_rows():
    rng = np.random.default_rng(0)
    made = [Example(np.ones(n, np.int32), np.arange(n) > 0, "", "") for n in rng.integers(2, 400, 3000)]
    _, report = pack(made, 768, 0)
    assert report.efficiency > 0.99


@pytest.mark.parametrize("window", [None, 4])
def test_packed_examples_cannot_see_each_other(characters, window):
    """The decoder's loss of every token is the same whether its example is packed or alone in a row."""
    config = dataclasses.replace(worlds.CONFIG, windows=(window, None))
    weights = worlds.weights(config)
    letters = np.random.default_rng(1)
    rows = ["".join(letters.choice(list("abcdefgh"), size)) for size in (3, 9, 5, 12, 4, 7)]
    made = list(
        tokenize([TextRow(f"{row}?", row[::-1]) for row in rows], make_template("plain", characters), characters)
    )
    alone, _ = pack(made, 48, characters.pad_id, several=False)
    packed, _ = pack(made, 48, characters.pad_id)
    assert len(packed.tokens) == 2 and (packed.segments == 0).any()
    loss, alone_loss = token_losses(config, weights, packed), token_losses(config, weights, alone)
    found = []
    for row, segment in itertools.product(range(2), range(1, 1 + packed.segments.max())):
        here = packed.segments[row] == segment
        found.append((packed.tokens[row, here], loss[row, here & packed.loss_mask[row]]))
    for example, losses, mask in zip(made, alone_loss, alone.loss_mask, strict=True):
        (together,) = [losses for tokens, losses in found if np.array_equal(tokens, example.tokens)]
        np.testing.assert_allclose(together, losses[mask], atol=1e-5)
    # The test can detect a leak: without segments the losses differ.
    mixed = token_losses(config, weights, dataclasses.replace(packed, segments=np.minimum(packed.segments, 1)))
    assert np.abs(mixed - loss)[packed.loss_mask].max() > 1e-2


def token_losses(config, weights, packed):
    """float32 [N, T]: negative log-probability of every token, predicted from the preceding ones; 0 at position 0."""
    rows = llama.Rows(packed.tokens, packed.positions, packed.segments)
    taken = _chances(config, weights, jax.tree.map(lambda leaf: jnp.asarray(np.resize(leaf, (6, 48))), rows))
    return -np.pad(np.asarray(taken), ((0, 0), (1, 0)))[: len(packed.tokens)]


@functools.partial(jax.jit, static_argnums=0)
def _chances(config, weights, rows):
    hidden, _ = llama.hidden(Model(config, weights), rows)
    chances = jax.nn.log_softmax(llama.logits(Model(config, weights), hidden))
    return jnp.take_along_axis(chances[:, :-1], rows.tokens[:, 1:, None], -1)[..., 0]
