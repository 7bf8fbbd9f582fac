"""Encodes and decodes text with a checkpoint's ``tokenizer.json``.

Whole texts get the same tokens as in Transformers 5; whether a beginning-of-sequence token (bos) is added depends on
the file's post-processor, not on ``add_bos_token`` of older configurations. One exception: Transformers 5 rebuilds
tokenizers of the class ``LlamaTokenizer`` from their vocabulary, while we follow the file; the two differ in how they
tokenize the beginning of text that follows a leading space, or a special token within the string.

An example is tokenized in separate *pieces*, so that the tokens of a prompt are the same as at evaluation, and no token
spans prompt and response: the tokenizer cannot merge across the boundary. A prefix that the tokenizer adds to every
text (the ``▁`` of Llama 2) is added to the first piece only.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instrdiv.runtime.errors import BadInput, needs
from instrdiv.runtime.files import write_json

if TYPE_CHECKING:
    import tokenizers


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A checkpoint's tokenizer.

    Attributes:
      path: the checkpoint's directory, for messages.
      named: special tokens by role: ``bos_token``, ``eos_token``, ``pad_token``, ...
      end_ids: tokens that end an answer: the tokenizer's eos token and those at which the checkpoint stops generating.
      chat_template: the checkpoint's own chat template (Jinja), if it has one.
    """

    path: Path
    named: dict[str, str]
    end_ids: tuple[int, ...]
    chat_template: str | None
    _backend: tokenizers.Tokenizer
    _later: tokenizers.Tokenizer  # the same, but adds nothing at the beginning of a text

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """Reads ``tokenizer.json`` and the configuration files next to it, if any.

        Raises BadInput, naming the file, if it is missing or damaged, or names an unknown token.
        """
        path = Path(path)
        backend = _load_backend(path / "tokenizer.json")
        config = _read_json(path / "tokenizer_config.json")
        legacy = {} if "added_tokens_decoder" in config else _read_json(path / "special_tokens_map.json")
        named = {name: token for name, value in {**config, **legacy}.items()
                 if name.endswith("_token") and (token := _content(value)) is not None}  # fmt: skip
        for name in ("bos_token", "eos_token"):
            if name in named and backend.token_to_id(named[name]) is None:
                raise BadInput(f"{path / 'tokenizer_config.json'}: its {name} {named[name]!r} is not in tokenizer.json")
        known = [token for token in named.values() if backend.token_to_id(token) is not None]
        backend.add_special_tokens(known)
        said = _read_json(path / "generation_config.json") or _read_json(path / "config.json")
        also = said.get("eos_token_id")
        ends = [backend.token_to_id(named.get("eos_token", "")), *(also if isinstance(also, list) else [also])]
        ends = list(dict.fromkeys(end for end in ends if end is not None))
        return cls(path, named, tuple(ends), _chat_template(path, config), backend, _later(backend))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, including added ones; a model's embedding may have more rows."""
        return self._backend.get_vocab_size()

    @property
    def pad_id(self) -> int:
        """The id used for padding, which is masked: the pad token, else an end token, else 0."""
        pad = self.token_id(self.named.get("pad_token", ""))
        return pad if pad is not None else self.end_ids[0] if self.end_ids else 0

    def token_id(self, token: str) -> int | None:
        """The id of this token; None if there is none."""
        return self._backend.token_to_id(token)

    def token(self, id: int) -> str:
        """The token as written in the vocabulary."""
        return self._backend.id_to_token(id) or f"<{id}>"

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """The tokens of a whole text; ``special_tokens`` adds those that the tokenizer puts around every text.

        Special tokens in the text itself are encoded as such. Raises BadInput if the tokenizer cannot encode the text.
        """
        return _encode(self._backend, [text], special_tokens)[0].ids

    def encode_pieces(self, texts: Sequence[Sequence[str]], start: bool = True) -> list[list[list[int]]]:
        """The tokens of every piece of every text.

        Args:
          texts: each a list of one or more pieces that concatenate to the text; the first must not be empty.
          start: whether to add what the tokenizer puts before every text, such as a bos token.
        """
        first = _encode(self._backend, [pieces[0] for pieces in texts], special_tokens=start)
        rest = iter(self._continue([piece for pieces in texts for piece in pieces[1:]]))
        return [[_without_end(encoding), *(next(rest) for _ in pieces[1:])]
                for encoding, pieces in zip(first, texts, strict=True)]  # fmt: skip

    def decode(self, ids: Iterable[int], start: bool = True, skip_special: bool = False) -> str:
        """The text of tokens.

        Args:
          ids: the tokens.
          start: False if they continue a text, so that a leading space is kept.
          skip_special: whether to omit special tokens.
        """
        return (self._backend if start else self._later).decode(list(ids), skip_special_tokens=skip_special)

    @functools.cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Matches special tokens in a text."""
        return _any_of(token.content for token in self._backend.get_added_tokens_decoder().values() if token.special)

    @functools.cached_property
    def _added_pattern(self) -> re.Pattern[str]:
        return _any_of(token.content for token in self._backend.get_added_tokens_decoder().values())

    def _continue(self, texts: list[str]) -> list[list[int]]:
        """The tokens of texts that continue others. From the first added token on, the unmodified tokenizer is used."""
        found = [self._added_pattern.search(text) for text in texts]
        cut = [match.start() if match else len(text) for match, text in zip(found, texts, strict=True)]
        heads = _encode(self._later, [text[:at] for text, at in zip(texts, cut, strict=True)], special_tokens=False)
        tails = _encode(self._backend, [text[at:] for text, at in zip(texts, cut, strict=True)], special_tokens=False)
        return [head.ids + tail.ids for head, tail in zip(heads, tails, strict=True)]


def character_tokenizer(alphabet: str, specials: Sequence[str]) -> tokenizers.Tokenizer:
    """A tokenizer with one token per character; characters outside the alphabet are an error.

    Args:
      alphabet: distinct characters, whose ids follow those of the special tokens.
      specials: such as ``("<pad>", "</s>")``, with ids from 0.
    """
    with needs("tokenizers", "finetune", "a character tokenizer"):
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: id for id, token in enumerate([*specials, *alphabet])}
    # The unknown token is not in the vocabulary, so that a character outside the alphabet is an error.
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="unknown"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return made


def write_tokenizer(path: Path, tokenizer: tokenizers.Tokenizer, **named: str) -> None:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json``, which ``Tokenizer.load`` and Transformers read.

    Args:
      path: the checkpoint's directory.
      tokenizer: the tokenizer to write.
      named: special tokens by role, such as ``eos_token="</s>"``.
    """
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}
    write_json(path / "tokenizer_config.json", config)


def _load_backend(path: Path) -> tokenizers.Tokenizer:
    with needs("tokenizers", "finetune", str(path)):
        import tokenizers
    if not path.is_file():
        if (path.parent / "tokenizer.model").is_file():
            convert = f"AutoTokenizer.from_pretrained({str(path.parent)!r}).save_pretrained({str(path.parent)!r})"
            raise BadInput(f"{path}: not found, only a tokenizer.model; convert it with Transformers: {convert}")
        raise BadInput(f"{path}: there is no such file")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise BadInput(f"{path}: cannot be read as a tokenizer: {error}") from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def _later(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer without adding a leading space when encoding, and without stripping one when decoding."""
    from tokenizers import Tokenizer

    said = json.loads(backend.to_str())

    def without(part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        if part.get("type") == "Metaspace":
            return part | {"prepend_scheme": "never"}
        if part.get("type") == "ByteLevel":
            return part | {"add_prefix_space": False}
        for name in ("normalizers", "pretokenizers", "decoders"):
            if name in part:
                kept = [without(p) for p in part[name] if p["type"] not in ("Prepend", "Strip")]
                return part | {name: kept}
        return None if part["type"] in ("Prepend", "Strip") else part

    same = {name: without(said[name]) for name in ("normalizer", "pre_tokenizer", "decoder")}
    if all(same[name] == said[name] for name in same):
        return backend
    return Tokenizer.from_str(json.dumps(said | same | {"post_processor": None}))


def _encode(backend: tokenizers.Tokenizer, texts: list[str], special_tokens: bool) -> list[tokenizers.Encoding]:
    try:
        return backend.encode_batch_fast(texts, add_special_tokens=special_tokens)
    except Exception as error:  # the library raises nothing narrower
        raise BadInput(f"the tokenizer cannot encode a text: {error}") from None


def _without_end(encoding: tokenizers.Encoding) -> list[int]:
    """The tokens without those that the tokenizer adds at the end of a text."""
    return encoding.ids[: max((i for i, added in enumerate(encoding.special_tokens_mask) if not added), default=-1) + 1]


def _chat_template(path: Path, config: dict[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"{file}: cannot be read: {error}") from None
    said = config.get("chat_template")
    if isinstance(said, list):  # several named templates
        said = {one.get("name"): one.get("template") for one in said if isinstance(one, dict)}.get("default")
    if said is not None and not isinstance(said, str):
        raise BadInput(f"{path / 'tokenizer_config.json'}: its chat_template must be a string")
    return said


def _content(value: Any) -> str | None:
    """A token from a configuration, which stores it as a string or an object."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read: {error}") from None
    if not isinstance(said, dict):
        raise BadInput(f"{path}: must be a JSON object")
    return said


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches any of these tokens, longest first; if there are none, matches nothing."""
    written = sorted((token for token in tokens if token), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, written)) or r"(?!)")
