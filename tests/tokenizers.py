"""Tiny tokenizers for tests, built the way that the real ones are, and written as checkpoints."""

import json
from pathlib import Path

TEXTS = [
    "Below is an instruction that describes a task. Write a response that completes the request.\n\n### Response:\n",
    "def add(a, b):\n    return a + b\n\n\n\nprint(add(1, 2))  # the answer is 3, is it not?\n",
    "The quick brown fox jumps over the lazy dog; the answer of the user is an answer to the user's question.",
    "[INST] <<SYS>> answer the question [/INST] the answer",
]


def byte_level(path: Path, bos: bool = True, eos: bool = False, **config) -> Path:
    """As Llama 3 (with bos) and Qwen 2 (without) have it: byte-level BPE behind a regular expression."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    specials = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    around = ["<|begin|>"] * bos + ["$A"] + ["<|end|>"] * eos
    known = [(token, made.token_to_id(token)) for token in around if token != "$A"]
    template = processors.TemplateProcessing(single=around, special_tokens=known)
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return _write(
        path,
        made,
        {
            "bos_token": "<|begin|>" if bos else None,
            "eos_token": "<|end|>",
            "pad_token": "<|pad|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        | config,
    )


def sentencepiece_like(path: Path, metaspace: bool = False, **config) -> Path:
    """As Llama 2 (normalizer) and Mistral (metaspace) have it: BPE with ``▁`` for a space and before every text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["<unk>", "<s>", "</s>"]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="never")  # tokens are within words
    trained.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=300, special_tokens=special))
    said = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in said["merges"]]
    # The vocabulary: special tokens, all bytes, then what was trained, newlines left to the bytes.
    merges = [pair for pair in merges if "\n" not in "".join(pair)]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [token for token in said["vocab"] if token not in special and "\n" not in token]
    made = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, merges, unk_token="<unk>",
                                fuse_unk=True, byte_fallback=True))  # fmt: skip
    if metaspace:
        made.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    end = {"content": "</s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    names = {"bos_token": "<s>", "eos_token": end | {"__type": "AddedToken"}, "unk_token": "<unk>"}
    return _write(path, made, names | {"tokenizer_class": "PreTrainedTokenizerFast"} | config)


def _write(path: Path, made, config: dict) -> Path:
    path.mkdir(exist_ok=True)
    made.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path
