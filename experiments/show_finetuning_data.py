"""Prints fine-tuning data as the model sees it: the text, the tokens, and which tokens the loss is on.

    python -m experiments.show_finetuning_data --data=alpaca.json --checkpoint=Llama-2-7b-hf --template=alpaca --num=3
    python -m experiments.show_finetuning_data --data=hub:ise-uiuc/Magicoder-OSS-Instruct-75K --checkpoint=... \\
        --template=magicoder --max_length=768 --report

Only the tokenizer of the checkpoint is read. In the text format, ⟦ and ⟧ enclose the parts that the loss is on;
``--format=tokens`` prints one line per token, ``--format=jsonl`` one object per example. ``--report`` tokenizes and
packs all rows, and reports on standard error what is cut off.
"""

import itertools
import json
import signal
import sys
from collections.abc import Sequence

from absl.flags import FlagValues

from instrdiv.data.packing import Example, pack, tokenize
from instrdiv.data.sources import read_rows
from instrdiv.data.templates import NAMED, make_template
from instrdiv.data.tokenizer import Tokenizer
from instrdiv.launch.flags import NameParser, NumberParser, define, define_enum, define_row_flags, define_switch, start
from instrdiv.runtime.errors import BadInput


def runs(example: Example, length: int) -> list[tuple[bool, list[int]]]:
    """(loss, tokens) for each run of tokens that the loss is or is not on, truncated to the length."""
    pairs = zip(example.tokens[:length].tolist(), example.loss_mask[:length].tolist(), strict=True)
    return [(loss, [token for token, _ in run]) for loss, run in itertools.groupby(pairs, lambda pair: pair[1])]


def as_text(example: Example, tokenizer: Tokenizer, length: int) -> str:
    """The text of an example, with marks around the parts that the loss is on."""
    parts = [tokenizer.decode(ids, start=not i) for i, (_, ids) in enumerate(runs(example, length))]
    marked = (f"⟦{part}⟧" if loss else part for part, (loss, _) in zip(parts, runs(example, length), strict=True))
    return f"{_head(example, length)}\n{''.join(marked)}\n"


def as_tokens(example: Example, tokenizer: Tokenizer, length: int) -> str:
    """One line per token: its position, a bar if the loss is on it, its id, and its spelling in the vocabulary."""
    pairs = zip(example.tokens[:length].tolist(), example.loss_mask[:length], strict=True)
    lines = [f"{place:6} {'|' if loss else ' '} {token:7}  {tokenizer.token(token)!r}"
             for place, (token, loss) in enumerate(pairs)]  # fmt: skip
    return "\n".join([_head(example, length), *lines, ""])


def as_json(example: Example, tokenizer: Tokenizer, length: int) -> str:
    """A JSON object: ``source, where, tokens, loss_mask, prompt, response``; the last two are of the first turn."""
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


def main(values: FlagValues) -> None:
    for name in ("data", "checkpoint"):
        if values[name].value is None:
            raise BadInput(f"--{name}: must be given: {values[name].help}")
    tokenizer = Tokenizer.load(values.checkpoint)
    template = make_template(values.template, tokenizer)
    dropped: list[str] | None = [] if values.drop_empty else None
    rows = read_rows(values.data, values.schema, dropped=dropped)
    examples = tokenize(rows if values.report else itertools.islice(rows, values.num), template, tokenizer)
    shown = list(itertools.islice(examples, values.num))
    for example in shown:
        print(FORMATS[values.format](example, tokenizer, values.max_length))
    if values.report:
        _, report = pack(itertools.chain(shown, examples), values.max_length, tokenizer.pad_id)
        print(report.text, file=sys.stderr)
    if dropped:
        print(f"Skipped {len(dropped):,} empty rows (first: {dropped[0]}).", file=sys.stderr)


def define_flags(values: FlagValues) -> None:
    templates = f"{', '.join(NAMED)}, chat (the checkpoint's own), or a Jinja file"
    define(values, NameParser(), "data", "a .jsonl, .json or .parquet file, a directory, or hub:owner/name[:split]")
    define_row_flags(values)
    define(values, NameParser(), "checkpoint", "a directory with a tokenizer.json")
    define(values, NameParser(), "template", f"how a row becomes text: {templates}", "alpaca")
    define(values, NumberParser(int, low=2), "max_length", "number of tokens to which examples are truncated", 768)
    define(values, NumberParser(int, low=0), "num", "number of examples to show", 3)
    define_enum(values, "format", list(FORMATS), "output format", "text")
    define_switch(values, "report", "read all rows, and report the effects of truncation and packing")


def launch(argv: Sequence[str] | None = None) -> int:
    """Runs this command in this process, with the flags in ``argv`` or, by default, those of the command line."""
    return start(main, define_flags, __doc__, argv, "show_finetuning_data.py")


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # exit quietly when piped into `head`
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    launch()
