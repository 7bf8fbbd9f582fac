"""Looks at fine-tuning data as a model sees them: which text, which tokens, and which of them the loss is on.

    python -m experiments.show_finetuning_data --data=alpaca.json --checkpoint=Llama-2-7b-hf --template=alpaca --num=3
    python -m experiments.show_finetuning_data --data=hub:ise-uiuc/Magicoder-OSS-Instruct-75K --checkpoint=... \\
        --template=magicoder --max_length=768 --report

Of the checkpoint, only the tokenizer is read. In text, what the loss is on stands between ⟦ and ⟧; ``--format=tokens``
has a line a token, ``--format=jsonl`` an object an example. ``--report`` tokenises and packs all rows, and says (on
standard error) what is cut off.
"""

import itertools
import json
import signal
import sys

from absl import flags

from instrdiv.finetuning.packing import Example, pack, tokenise
from instrdiv.finetuning.sources import SCHEMAS, read_rows
from instrdiv.finetuning.templates import NAMED, make_template
from instrdiv.finetuning.tokenizer import Tokenizer
from instrdiv.launcher import FLAGS, NameParser, NumberParser, define_switch, start
from instrdiv.settings import BadInput


def runs(example: Example, length: int) -> list[tuple[bool, list[int]]]:
    """(loss, tokens) of every run of tokens that are alike in that, cut at the length."""
    pairs = zip(example.tokens[:length].tolist(), example.loss_mask[:length].tolist(), strict=True)
    return [(loss, [token for token, _ in run]) for loss, run in itertools.groupby(pairs, lambda pair: pair[1])]


def as_text(example: Example, tokenizer: Tokenizer, length: int) -> str:
    """The text of an example, with marks around what the loss is on."""
    parts = [tokenizer.decode(ids, start=not i) for i, (_, ids) in enumerate(runs(example, length))]
    marked = (f"⟦{part}⟧" if loss else part for part, (loss, _) in zip(parts, runs(example, length), strict=True))
    return f"{_head(example, length)}\n{''.join(marked)}\n"


def as_tokens(example: Example, tokenizer: Tokenizer, length: int) -> str:
    """A line a token: its place, its number, how the vocabulary writes it; a bar where the loss is on it."""
    pairs = zip(example.tokens[:length].tolist(), example.loss_mask[:length], strict=True)
    lines = [f"{place:6} {'|' if loss else ' '} {token:7}  {tokenizer.token(token)!r}"
             for place, (token, loss) in enumerate(pairs)]  # fmt: skip
    return "\n".join([_head(example, length), *lines, ""])


def as_json(example: Example, tokenizer: Tokenizer, length: int) -> str:
    """``source, where, tokens, loss_mask, prompt, response``; the last two are of the first turn."""
    prompt, response, *_ = [*runs(example, length), (True, [])]
    return json.dumps({
        "source": example.source,
        "where": example.where,
        "tokens": example.tokens[:length].tolist(),
        "loss_mask": example.loss_mask[:length].astype(int).tolist(),
        "prompt": tokenizer.decode(prompt[1]),
        "response": tokenizer.decode(response[1], start=False),
    })  # fmt: skip


FORMATS = {"text": as_text, "tokens": as_tokens, "jsonl": as_json}


def _head(example: Example, length: int) -> str:
    size, kept = len(example.tokens), int(example.loss_mask[:length].sum())
    cut = f", cut at {length}" if size > length else ""
    return f"--- {example.where}: {size} tokens{cut}, the loss on {kept}"


def main() -> None:
    if hasattr(signal, "SIGPIPE"):  # so that `| head` ends it quietly
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    for name in ("data", "checkpoint"):
        if FLAGS[name].value is None:
            raise BadInput(f"--{name}: must be given; it is {FLAGS[name].help}")
    tokenizer = Tokenizer.load(FLAGS.checkpoint)
    template = make_template(FLAGS.template, tokenizer)
    dropped: list[str] | None = [] if FLAGS.drop_empty else None
    rows = read_rows(FLAGS.data, FLAGS.schema, dropped=dropped)
    examples = tokenise(rows if FLAGS.report else itertools.islice(rows, FLAGS.num), template, tokenizer)
    shown = list(itertools.islice(examples, FLAGS.num))
    for example in shown:
        print(FORMATS[FLAGS.format](example, tokenizer, FLAGS.max_length))
    if FLAGS.report:
        _, report = pack(itertools.chain(shown, examples), FLAGS.max_length, tokenizer.pad_id)
        print(report.text, file=sys.stderr)
    if dropped:
        print(f"left out, because they ask or answer nothing: {len(dropped):,}, first {dropped[0]}", file=sys.stderr)


if __name__ == "__main__":
    schemas = f"{', '.join(SCHEMAS)}, or fields of your own such as instruction=question,response=answer"
    templates = f"{', '.join(NAMED)}, chat (the checkpoint's own), or a Jinja file"
    flags.DEFINE(NameParser(), "data", None, "a .jsonl, .json or .parquet file, a directory, or hub:owner/name[:split]")
    flags.DEFINE(NameParser(), "schema", None, f"what its fields mean (default: by the fields): {schemas}")
    flags.DEFINE(NameParser(), "checkpoint", None, "a directory with a tokenizer.json")
    flags.DEFINE(NameParser(), "template", "alpaca", f"how a row becomes text: {templates}")
    flags.DEFINE(NumberParser(int, low=2), "max_length", 768, "tokens at which examples are cut")
    flags.DEFINE(NumberParser(int, low=0), "num", 3, "how many examples are shown")
    flags.DEFINE_enum("format", "text", list(FORMATS), "how they are shown")
    define_switch("report", "read all rows, and say what truncation and packing do to them")
    define_switch("drop_empty", "leave out rows that ask or answer nothing, and say how many")
    start(main)
