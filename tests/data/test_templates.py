import json

import pytest

from instrdiv.data.schemas import TextRow
from instrdiv.data.templates import NAMED, end_ids, make_template
from instrdiv.data.tokenizer import Tokenizer
from instrdiv.runtime.errors import BadInput
from tests.tokenizers import byte_level, sentencepiece_like

pytest.importorskip("tokenizers")

PLAIN = TextRow("Add {2} and 3.", "It is 5.", where="a.jsonl: line 1")
ALL = TextRow("Add.", "5", input="2 and 3", system="Be brief.", turns=(("Why?", "So."),), where="a.jsonl: line 2")
PREAMBLE = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
)
MAGICODER = (
    "You are an exceptionally intelligent coding assistant that consistently delivers accurate and reliable responses "
    "to user instructions.\n\n@@ Instruction\n"
)
#: Written by hand from the repositories named in the module. <<...>> marks the text with loss.
WRITTEN = {
    "plain": ("Add {2} and 3.<<It is 5.<|end|>>>", "Be brief.\n\nAdd.\n\n2 and 3<<5<|end|>>>Why?<<So.<|end|>>>"),
    "alpaca": (
        PREAMBLE.format("") + "### Instruction:\nAdd {2} and 3.\n\n### Response:<<It is 5.<|end|>>>",
        PREAMBLE.format(", paired with an input that provides further context")
        + "### Instruction:\nBe brief.\n\nAdd.\n\n### Input:\n2 and 3\n\n### Response:<<5<|end|>>>"
        "\n\n### Instruction:\nWhy?\n\n### Response:<<So.<|end|>>>",
    ),
    "magicoder": (
        MAGICODER + "Add {2} and 3.\n\n@@ Response\n<<It is 5.<|end|>>>",
        MAGICODER + "Be brief.\n\nAdd.\n\n2 and 3\n\n@@ Response\n<<5<|end|>>>"
        "\n\n@@ Instruction\nWhy?\n\n@@ Response\n<<So.<|end|>>>",
    ),
    "chatml": (
        "<|im_start|>user\nAdd {2} and 3.<|im_end|>\n<|im_start|>assistant\n<<It is 5.<|im_end|>>>",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAdd.\n\n2 and 3<|im_end|>\n<|im_start|>assistant\n"
        "<<5<|im_end|>>>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<<So.<|im_end|>>>",
    ),
    "llama2": (
        "[INST] Add {2} and 3. [/INST]<< It is 5. <|end|>>>",
        "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nAdd.\n\n2 and 3 [/INST]<< 5 <|end|>>>"
        "<|begin|>[INST] Why? [/INST]<< So. <|end|>>>",
    ),
}
#: Chat templates as found in checkpoints: Llama 2 and Mistral, ChatML with a default system prompt, Llama 3.
CHATS = {
    "llama2": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + "
    "'\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "qwen": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "marked": """{{ bos_token }}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- 'A: ' }}{% generation %}{{ m.content | trim }}{{ eos_token }}{% endgeneration %}{{ '\\n' }}
    {%- else %}
        {%- if m.content == '' %}{% continue %}{% endif %}
        {{- m.role[0] | upper ~ ': ' ~ m.content | trim ~ (m | tojson) ~ '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'A: ' }}{% endif %}
""",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(byte_level(tmp_path_factory.mktemp("byte")))


def marked(pieces):
    return "".join(f"<<{piece.text}>>" if piece.loss else piece.text for piece in pieces)


@pytest.mark.parametrize("name", NAMED)
def test_named_templates_are_as_they_are_documented(name, tokenizer):
    template = make_template(name, tokenizer)
    for row, expected in zip((PLAIN, ALL), WRITTEN[name], strict=True):
        pieces = template.pieces(row)
        assert marked(pieces) == expected
        assert template.prompt(row) == pieces[0].text and not template.starts


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("in_file", [False, True])
def test_chat_templates_are_rendered_as_transformers_does(name, in_file, tmp_path):
    """The tokens agree, too, where no token spans prompt and response."""
    transformers = pytest.importorskip("transformers")
    path = byte_level(tmp_path / "checkpoint", **({} if in_file else {"chat_template": CHATS[name]}))
    if in_file:
        (path / "chat_template.jinja").write_text(CHATS[name])
    theirs, ours = transformers.AutoTokenizer.from_pretrained(path), Tokenizer.load(path)
    template = make_template("chat", ours)
    for row in (PLAIN, ALL):
        messages = [{"role": "system", "content": row.system}] if row.system else []
        messages += [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.response}]
        for instruction, response in row.turns:
            messages += [{"role": "user", "content": instruction}, {"role": "assistant", "content": response}]
        pieces = template.pieces(row)
        whole = theirs.apply_chat_template(messages, tokenize=False)
        text = "".join(piece.text for piece in pieces)
        assert whole.startswith(text) and whole[len(text) :].strip() == ""
        ids = [
            token for piece in ours.encode_pieces([[p.text for p in pieces]], not template.starts)[0] for token in piece
        ]
        assert ids == theirs.apply_chat_template(messages, return_dict=False)[: len(ids)]
        first = messages[: 1 + bool(row.system)]
        assert template.prompt(row) == theirs.apply_chat_template(first, tokenize=False, add_generation_prompt=True)
        # The loss is on the responses and their end tokens only.
        end = "<|im_end|>" if name == "qwen" else "<|end|>"
        learned = [piece.text.strip() for piece in pieces if piece.loss]
        space = " " if name == "llama2" else ""
        assert learned == [f"{text}{space}{end}" for text in (row.response, *(response for _, response in row.turns))]


def test_the_marks_of_the_template_itself_are_where_the_loss_is(tokenizer):
    """Transformers finds the responses by ``{% generation %}``; we find them by rendering fewer turns."""
    chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [{"role": "user", "content": "Add.\n\n2 and 3"}, {"role": "assistant", "content": "5"},
                {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]  # fmt: skip
    (text,), (spans,) = chat_template_utils.render_jinja_template(
        [messages], chat_template=CHATS["marked"], return_assistant_tokens_mask=True, **tokenizer.named
    )
    path = tokenizer.path / "marked.jinja"
    path.write_text(CHATS["marked"])
    row = TextRow("Add.", "5", input="2 and 3", turns=(("Why?", "So."),))
    pieces = make_template(str(path), tokenizer).pieces(row)
    assert [piece.text for piece in pieces if piece.loss] == [text[start:end] for start, end in spans]


def test_the_tokens_that_end_an_answer(tokenizer):
    end, turn = tokenizer.token_id("<|end|>"), tokenizer.token_id("<|im_end|>")
    assert {name: end_ids(make_template(name, tokenizer), tokenizer) for name in NAMED} == {
        **dict.fromkeys(NAMED, (end,)),
        "chatml": (end, turn),
    }
    path = tokenizer.path / "qwen.jinja"
    path.write_text(CHATS["qwen"])
    assert end_ids(make_template(str(path), tokenizer), tokenizer) == (end, turn)


def mistake(which, tokenizer, row=PLAIN):
    with pytest.raises(BadInput) as raised:
        make_template(which, tokenizer).pieces(row)
    said = str(raised.value)
    assert "\n" not in said
    return said


def test_templates_that_cannot_be(tokenizer, tmp_path):
    assert mistake("alpacca", tokenizer).startswith("--template=alpacca: must be plain, alpaca, ")
    none = f"--template=chat: {tokenizer.path} has no chat template; use one of plain, alpaca, magicoder, chatml, "
    assert mistake("chat", tokenizer).startswith(none)
    other = Tokenizer.load(sentencepiece_like(tmp_path / "piece"))
    assert "needs the special token <|im_start|>, which" in mistake("chatml", other)
    config = tmp_path / "piece" / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": "<s>"}))
    assert "--template=plain: ends responses with the eos token, which" in mistake(
        "plain", Tokenizer.load(config.parent)
    )


def test_rows_that_a_chat_template_cannot_express(tokenizer, tmp_path):
    for source, part in [
        ("{% for m in messages %}", "line 1: is not a valid Jinja template: Unexpected end of template"),
        ("{{ raise_exception('no system role') }}", "a.jsonl: line 2: {path} cannot render this row: no system role"),
        ("{{ messages[0].content + 1 }}", "a.jsonl: line 2: {path} cannot render this row: can only concatenate str"),
        ("{{ strftime_now('%d') }}", "cannot render this row: 'strftime_now' is undefined"),
        ("{{ messages.append(1) }}", "cannot render this row: access to attribute 'append'"),
        ("{{ ''.__class__.__mro__ }}", "cannot render this row: access to attribute '__class__'"),
        ("{{ messages[-1].content }}<|end|>", "changes or omits the text before turn 3"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "does not end the response of turn 3 with a special"),
    ]:
        path = tmp_path / "own.jinja"
        path.write_text(source)
        said = mistake(str(path), tokenizer, ALL)
        assert part.format(path=path) in said, said
