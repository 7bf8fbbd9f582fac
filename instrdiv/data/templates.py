"""Prompt templates: turn a row into the text that a model reads.

A template splits the text into pieces and marks those that the loss covers: the responses, each with the special token
that ends it, and nothing else.

``NAMED`` are formats from the literature. Any other template is a Jinja chat template: the checkpoint's own, or a file.
It is rendered as in Transformers; the prompt of a response is the rendering of the preceding turns with
``add_generation_prompt``. A chat template writes everything, including the beginning-of-sequence token; for a named
format, the tokenizer prepends that token, as to any text.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jinja2
import jinja2.ext
import jinja2.sandbox

from instrdiv.data.schemas import TextRow
from instrdiv.data.tokenizer import Tokenizer
from instrdiv.runtime.errors import BadInput


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """A part of a text, and whether the model is trained to write it."""

    text: str
    loss: bool


class Template(Protocol):
    """Turns rows into text.

    Attributes:
      name: for messages.
      starts: whether the text has its own beginning-of-sequence token, so that the tokenizer must not add one.
    """

    name: str
    starts: bool

    def pieces(self, row: TextRow) -> list[Piece]:
        """The text of a row, from its prompt to the token that ends its last response. Prompt and response alternate.

        Raises BadInput, naming the row, if the template cannot express it.
        """

    def prompt(self, row: TextRow) -> str:
        """The text up to the start of the first response: the model's input at evaluation."""


@dataclasses.dataclass(frozen=True)
class Format:
    """A named template, as strings with placeholders {system}, {instruction}, {input}, {response}, {bos} and {eos}.

    Attributes:
      first: the first turn of the user, up to the start of the response.
      first_with_input: the same for a row with an input; if None, the input follows the instruction.
      later: any further turn of the user, including the separator between turns.
      system: the text for {system} if there is a system prompt.
      response: a response and the token that ends it.
    """

    first: str
    later: str
    first_with_input: str | None = None
    system: str = "{system}\n\n"
    response: str = "{response}{eos}"


_ALPACA = (
    "Below is an instruction that describes a task{more}. Write a response that appropriately completes the request."
)
_ALPACA_TURN = "\n\n### Instruction:\n{system}{instruction}\n\n### Response:"
_MAGICODER = "You are an exceptionally intelligent coding assistant that consistently delivers accurate and reliable "
_MAGICODER_TURN = "\n\n@@ Instruction\n{system}{instruction}\n\n@@ Response\n"
_CHATML_TURN = "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n"

#: Handling of system prompts and further turns is our choice, except in the chat formats (chatml, llama2).
NAMED = {
    # The unchanged instruction, for data with its own format.
    "plain": Format("{system}{instruction}", later="{instruction}"),
    # tatsu-lab/stanford_alpaca, train.py: the response directly follows the colon.
    "alpaca": Format(
        first=_ALPACA.replace("{more}", "") + _ALPACA_TURN,
        first_with_input=_ALPACA.replace("{more}", ", paired with an input that provides further context")
        + _ALPACA_TURN.replace("{instruction}", "{instruction}\n\n### Input:\n{input}"),
        later=_ALPACA_TURN,
    ),
    # ise-uiuc/magicoder, prompt_template.py, as of arXiv 2312.02120.
    "magicoder": Format(_MAGICODER + "responses to user instructions." + _MAGICODER_TURN, later=_MAGICODER_TURN),
    "chatml": Format(
        first="{system}" + _CHATML_TURN,
        later="\n" + _CHATML_TURN,
        system="<|im_start|>system\n{system}<|im_end|>\n",
        response="{response}<|im_end|>",
    ),
    # meta-llama/llama, generation.py: every turn begins and ends a sequence.
    "llama2": Format(
        first="[INST] {system}{instruction} [/INST]",
        later="{bos}[INST] {instruction} [/INST]",
        system="<<SYS>>\n{system}\n<</SYS>>\n\n",
        response=" {response} {eos}",
    ),
}


def make_template(which: str, tokenizer: Tokenizer) -> Template:
    """The template with this name in ``NAMED``, the checkpoint's own (``chat``), or one from a Jinja file.

    Raises BadInput if there is none, or if it needs a special token that the tokenizer lacks.
    """
    if which in NAMED:
        return _NamedTemplate(which, NAMED[which], tokenizer)
    if which == "chat":
        if tokenizer.chat_template is None:
            raise BadInput(f"--template=chat: {tokenizer.path} has no chat template; use one of {', '.join(NAMED)}")
        return _ChatTemplate(f"the chat template of {tokenizer.path}", tokenizer.chat_template, tokenizer)
    path = Path(which)
    if not path.is_file():
        raise BadInput(f"--template={which}: must be {', '.join(NAMED)}, chat (the checkpoint's own), or a Jinja file")
    try:
        return _ChatTemplate(str(path), path.read_text(encoding="utf-8"), tokenizer)
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read: {error}") from None


def end_ids(template: Template, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end an answer: the checkpoint's end tokens, and the one that ends responses in this template."""
    response = template.pieces(TextRow("a", "b", where="a first trial"))[-1].text
    *_, last = tokenizer.special_pattern.findall(response)
    last_id = tokenizer.token_id(last)
    assert last_id is not None
    return tuple(dict.fromkeys([*tokenizer.end_ids, last_id]))


class _NamedTemplate:
    starts = False

    def __init__(self, name: str, format: Format, tokenizer: Tokenizer):
        self.name, self._format = name, format
        self._special = {"bos": tokenizer.named.get("bos_token", ""), "eos": tokenizer.named.get("eos_token", "")}
        written = "".join(filter(None, dataclasses.astuple(format)))
        if "{eos}" in written and not self._special["eos"]:
            raise BadInput(
                f"--template={name}: ends responses with the eos token, which {tokenizer.path} does not define"
            )
        for token in ("<|im_start|>", "<|im_end|>"):
            if token in written and not tokenizer.special_pattern.fullmatch(token):
                raise BadInput(f"--template={name}: needs the special token {token}, which {tokenizer.path} lacks")

    def pieces(self, row: TextRow) -> list[Piece]:
        pieces = [Piece(self.prompt(row), False), self._response(row.response)]
        for instruction, response in row.turns:
            pieces += [
                Piece(self._filled(self._format.later, instruction=instruction), False),
                self._response(response),
            ]
        return pieces

    def prompt(self, row: TextRow) -> str:
        form = self._format
        system = self._filled(form.system, system=row.system) if row.system else ""
        if row.input and form.first_with_input is not None:
            return self._filled(form.first_with_input, system=system, instruction=row.instruction, input=row.input)
        return self._filled(form.first, system=system, instruction=row.prompt)

    def _response(self, text: str) -> Piece:
        return Piece(self._filled(self._format.response, response=text), True)

    def _filled(self, form: str, **values: str) -> str:
        return form.format(**{"system": "", **self._special, **values})  # values are not searched for placeholders


class _ChatTemplate:
    starts = True

    def __init__(self, name: str, source: str, tokenizer: Tokenizer):
        self.name, self._named, self._special = name, tokenizer.named, tokenizer.special_pattern
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise BadInput(f"{name}: line {error.lineno}: is not a valid Jinja template: {error.message}") from None

    def pieces(self, row: TextRow) -> list[Piece]:
        messages, pieces, done = _messages(row), [], ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:number], row, True)
            text = self._render(messages[: number + 1], row, False)
            for longer, shorter in ((prompt, done), (text, prompt)):
                if not longer.startswith(shorter) or longer == shorter:
                    raise BadInput(
                        f"{row.where}: {self.name} changes or omits the text before turn {number + 1}, so the response "
                        "cannot be located; use another --template"
                    )
            last = max((match.end() for match in self._special.finditer(text, len(prompt))), default=None)
            if last is None or text[last:].strip():
                raise BadInput(
                    f"{row.where}: {self.name} does not end the response of turn {number + 1} with a special token, so "
                    "the model would not learn to stop; add {{ eos_token }} after the response"
                )
            pieces += [Piece(prompt[len(done) :], False), Piece(text[len(prompt) : last], True)]
            done = text[:last]
        return pieces

    def prompt(self, row: TextRow) -> str:
        messages = _messages(row)
        return self._render(messages[: 1 + bool(row.system)], row, True)

    def _render(self, messages: list[dict[str, str]], row: TextRow, add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._named,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise BadInput(f"{row.where}: {self.name} cannot render this row: {error}") from None


def _messages(row: TextRow) -> list[dict[str, str]]:
    """The turns of a row as chat messages."""
    said = [("user", row.prompt), ("assistant", row.response)]
    for instruction, response in row.turns:
        said += [("user", instruction), ("assistant", response)]
    if row.system:
        said.insert(0, ("system", row.system))
    return [{"role": role, "content": content} for role, content in said]


def _environment() -> jinja2.Environment:
    """The Jinja environment of Transformers without ``strftime_now``, because rows must not depend on the date."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    return environment


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks responses for other trainers; its content is rendered unchanged."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's convention)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> Mapping:
    raise jinja2.TemplateError(message)
