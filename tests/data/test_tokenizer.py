import json

import pytest

from instrdiv.data.tokenizer import Tokenizer, character_tokenizer, write_tokenizer
from instrdiv.runtime.errors import BadInput
from tests.tokenizers import byte_level, sentencepiece_like

pytest.importorskip("tokenizers")

TEXTS = [
    "The answer is 42, isn't it?",
    "",
    " leading and trailing  ",
    "\n\nlines\n\tand tabs\r\n",
    "Ünïcödé — 日本語 🎉\u200d",
    "the answer</s> behind <|im_end|> special <s>tokens<|begin|>",
    "def f(x):\n    return x\n\n\n\nprint(f(1))",
]
KINDS = {
    "llama3": byte_level,
    "qwen2": lambda path: byte_level(path, bos=False, add_bos_token=False),
    "llama2": lambda path: sentencepiece_like(path, add_bos_token=True, add_eos_token=False),
    "mistral": lambda path: sentencepiece_like(path, metaspace=True),
    "older": lambda path: byte_level(path, bos=False, add_bos_token=True, add_eos_token=True),
    "ends": lambda path: byte_level(path, eos=True),
}


@pytest.fixture(params=KINDS)
def made(request, tmp_path):
    return KINDS[request.param](tmp_path / "checkpoint")


def test_tokens_are_those_of_transformers(made):
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(made), Tokenizer.load(made)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs(text).input_ids
        assert ours.encode(text, special_tokens=False) == theirs(text, add_special_tokens=False).input_ids
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, skip_special=True) == theirs.decode(ids, skip_special_tokens=True)
    assert [ours.token_id(ours.named["eos_token"])] == [theirs.eos_token_id] == list(ours.end_ids)
    assert ours.named.get("bos_token") == theirs.bos_token and ours.vocab_size == len(theirs)


def test_llama_s_own_class_agrees_but_for_what_is_said(tmp_path):
    """Transformers 5 rebuilds the tokenizer from the vocabulary; the module's docstring names the texts that differ."""
    transformers = pytest.importorskip("transformers")
    path = sentencepiece_like(tmp_path / "llama2", tokenizer_class="LlamaTokenizer", legacy=False, add_bos_token=True)
    (path / "config.json").write_text('{"model_type": "llama"}')
    theirs, ours = transformers.AutoTokenizer.from_pretrained(path), Tokenizer.load(path)
    assert type(theirs).__name__ == "LlamaTokenizer"
    differ = [text for text in TEXTS if ours.encode(text) != theirs(text).input_ids]
    assert differ == [text for text in TEXTS if text.startswith(" ") or "</s>" in text]


def test_pieces_are_the_text_and_only_the_first_is_a_beginning(made):
    tokenizer = Tokenizer.load(made)
    pieces = ["### Response:\n", "the answer", " is 3", "", "\n\n", "  user's é\n"]
    (ids,) = tokenizer.encode_pieces([pieces])
    whole = [token for piece in ids for token in piece]
    assert ids[0] == [token for token in tokenizer.encode(pieces[0]) if token not in tokenizer.end_ids]
    assert (tokenizer.decode(ids[0]) + tokenizer.decode(whole[len(ids[0]) :], start=False)).endswith("".join(pieces))
    for piece, tokens in zip(pieces[1:], ids[1:], strict=True):
        assert tokenizer.decode(tokens, start=False) == piece
    # Without the tokens that the tokenizer puts at the start of a text; nothing else changes.
    (bare,) = tokenizer.encode_pieces([pieces], start=False)
    assert tokenizer.decode(token for piece in bare for token in piece) == "".join(pieces)
    assert bare[1:] == ids[1:] and bare[0] == tokenizer.encode(pieces[0], special_tokens=False)


def test_where_nothing_merges_pieces_have_the_tokens_of_the_whole_text(made):
    """A word after a line end, which is a separate token in all of these, and a word with its leading space."""
    tokenizer = Tokenizer.load(made)
    for pieces in (["### Response:\n", "the answer", " is 3"], ["[INST] the user [/INST]", " the answer </s>"]):
        ids = [token for piece in tokenizer.encode_pieces([pieces], start=False)[0] for token in piece]
        assert ids == tokenizer.encode("".join(pieces), special_tokens=False)


def test_no_token_is_half_prompt_half_response(tmp_path):
    """The whole text would have one token for the four line ends; each piece has its own tokens instead."""
    tokenizer = Tokenizer.load(byte_level(tmp_path / "byte"))
    ids = tokenizer.encode_pieces([["b\n\n", "\n\nprint"]])[0]
    assert ids[0] == tokenizer.encode("b\n\n")
    whole = tokenizer.encode("b\n\n\n\nprint")
    assert len(whole) < len(ids[0] + ids[1]) and tokenizer.decode(ids[0] + ids[1]) == tokenizer.decode(whole)


def test_behind_a_special_token_a_piece_is_as_the_file_has_it(tmp_path):
    """In Llama 2's format, ``▁[INST]`` follows ``<s>`` in later turns just as at the start of the conversation."""
    tokenizer = Tokenizer.load(sentencepiece_like(tmp_path / "llama2"))
    turn = tokenizer.encode("[INST] the user [/INST]", special_tokens=False)
    ids = tokenizer.encode_pieces([["[INST] the user [/INST]", " answer </s>", "<s>[INST] the user [/INST]"]])[0]
    assert ids[0] == [1, *turn] and ids[2] == [1, *turn]
    assert tokenizer.decode(ids[1], start=False) == " answer </s>"


def test_ends_and_padding(tmp_path):
    path = byte_level(tmp_path / "byte")
    tokenizer = Tokenizer.load(path)
    end, pad, other = (tokenizer.token_id(token) for token in ("<|end|>", "<|pad|>", "<|im_end|>"))
    assert tokenizer.end_ids == (end,) and tokenizer.pad_id == pad
    (path / "config.json").write_text(json.dumps({"eos_token_id": end}))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, other]}))
    assert Tokenizer.load(path).end_ids == (end, other)
    assert Tokenizer.load(sentencepiece_like(tmp_path / "piece")).pad_id == 2


def test_the_map_of_special_tokens_is_read_where_the_configuration_is_older(tmp_path):
    transformers = pytest.importorskip("transformers")
    path = byte_level(tmp_path / "byte")
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|begin|>"}')
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    assert (
        Tokenizer.load(path).named == theirs.special_tokens_map == {"eos_token": "<|im_end|>", "bos_token": "<|begin|>"}
    )


def test_a_named_token_of_the_vocabulary_is_one_token_in_a_text(tmp_path):
    """Even if tokenizer.json does not list it as a special token; Transformers adds it to them."""
    transformers = pytest.importorskip("transformers")
    path = sentencepiece_like(tmp_path / "piece")
    said = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps(said | {"added_tokens": []}))
    ours, theirs = Tokenizer.load(path), transformers.AutoTokenizer.from_pretrained(path)
    assert ours.encode("the answer</s>") == theirs("the answer</s>").input_ids
    assert ours.encode("the answer</s>")[-1] == ours.end_ids[0] == 2
    assert ours.special_pattern.findall("the answer</s>") == ["</s>"]


def test_a_tokenizer_of_characters(tmp_path):
    made = character_tokenizer("abc#\n", ("<pad>", "</s>"))
    write_tokenizer(tmp_path, made, eos_token="</s>", pad_token="<pad>")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("ab#\nc</s>") == [2, 3, 5, 6, 4, 1]
    assert tokenizer.decode([2, 3, 5, 6, 4, 1]) == "ab#\nc</s>"
    assert tokenizer.encode_pieces([["ab#", "c</s>"]]) == [[[2, 3, 5], [4, 1]]]
    assert (tokenizer.vocab_size, tokenizer.end_ids, tokenizer.pad_id) == (7, (1,), 0)
    with pytest.raises(BadInput, match="the tokenizer cannot encode a text"):
        tokenizer.encode("abz")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("ab#\nc</s>").input_ids == [2, 3, 5, 6, 4, 1] and theirs.pad_token_id == 0
    assert theirs.decode([2, 3, 5, 6, 4, 1]) == "ab#\nc</s>"


def test_mistakes(tmp_path):
    def said():
        with pytest.raises(BadInput) as mistake:
            Tokenizer.load(tmp_path)
        assert "\n" not in str(mistake.value)
        return str(mistake.value)

    assert said() == f"{tmp_path / 'tokenizer.json'}: there is no such file"
    (tmp_path / "tokenizer.model").write_bytes(b"")
    assert "only a tokenizer.model; convert it with Transformers: AutoTokenizer" in said()
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    assert said().startswith(f"{tmp_path / 'tokenizer.json'}: cannot be read as a tokenizer: ")
    write_tokenizer(tmp_path, character_tokenizer("ab", ("</s>",)), eos_token="<|end|>")
    assert said() == f"{tmp_path / 'tokenizer_config.json'}: its eos_token '<|end|>' is not in tokenizer.json"
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": {"x": 1}}')
    assert said() == f"{tmp_path / 'tokenizer_config.json'}: its chat_template must be a string"
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    assert said() == f"{tmp_path / 'tokenizer_config.json'}: must be a JSON object"
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert said().startswith(f"{tmp_path / 'tokenizer_config.json'}: cannot be read: ")
