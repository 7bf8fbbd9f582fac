"""Export: what is written is a GPT-2, by an independent reading of its files and by Transformers', and is our model."""

import functools
import itertools
import json
import math
import shutil
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instrdiv.config.groups import make_groups
from instrdiv.config.layout import Options
from instrdiv.config.pools import RulePools
from instrdiv.config.settings import Member
from instrdiv.config.sweep import Sweep
from instrdiv.models.decoder import make_decoder
from instrdiv.runs.export import export_member, gpt2_checkpoint, write_checkpoint
from instrdiv.runs.saved import RunDirectory, SavedRun
from instrdiv.runtime.errors import BadInput
from instrdiv.tasks.strings.alphabet import Alphabet
from instrdiv.tasks.tokens import END, PAD
from instrdiv.training.members import MemberState
from instrdiv.training.population import stack_group, training_example
from tests.commands import command
from tests.worlds import tiny

RAGGED = {"pattern_length_min": 1, "replacement_length_min": 0, "input_length_min": 3, "held_out": "pattern"}
# Every norm with every activation, with and without biases; head and rows such that every pair of choices occurs.
VARIANTS = [
    {"norm": norm, "activation": activation, "biases": biases, "tied_head": (tied := biases == (activation == "gelu"))}
    | (RAGGED if tied == (norm == "rmsnorm") else {})
    for norm, activation, biases in itertools.product(("layernorm", "rmsnorm"), ("gelu", "relu"), (True, False))
]


def random_params(group, seed=0, embedding_scale=1.0):
    """Parameters that no initialization gives: nothing is 0 or 1, so nothing can be forgotten."""
    decoder, rng = make_decoder(group), np.random.default_rng(seed)
    tokens, padding = jnp.zeros((1, decoder.sequence), jnp.int32), jnp.zeros(1, jnp.int32)
    shapes = jax.eval_shape(lambda: decoder.init(jax.random.key(0), tokens, padding))
    params = jax.tree.map(lambda leaf: rng.normal(0.2, 0.4, leaf.shape).astype(np.float32), shapes)
    for name in ("embedding", "positions"):
        if name in params["params"]:
            params["params"][name] *= np.float32(embedding_scale)
    return params


def real_examples(group, count=6):
    """The first examples of the training set of the group's first member."""
    tables, data = jax.tree.map(jnp.asarray, stack_group(group, RulePools(group.members), 1))
    data = jax.tree.map(lambda leaf: leaf[0], data)
    return jax.vmap(lambda index: training_example(group, tables, data, index))(jnp.arange(count))


def make_export(directory, embedding_scale=1.0, **changes):
    """A written checkpoint, and what it must reproduce: our logits on real examples (without their last token)."""
    member = Member(tiny(layers=2, **changes), 0)
    (group,) = make_groups([member])
    params, batch = random_params(group, 0, embedding_scale), real_examples(group)
    write_checkpoint(directory, group, member, params, step=4)
    tokens = batch.tokens[:, :-1]
    decoder = make_decoder(group)
    decode = jax.jit(functools.partial(decoder.apply, answer_only=False))
    logits = np.asarray(decode(params, tokens, batch.padding))
    return SimpleNamespace(
        path=directory, group=group, decoder=decoder, params=params, decode=decode,
        tokens=np.asarray(tokens), padding=np.asarray(batch.padding), logits=logits,
        attended=np.arange(tokens.shape[1]) >= np.asarray(batch.padding)[:, None])  # fmt: skip


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda v: "-".join(str(value) for value in list(v.values())[:5]))
def exported(request, tmp_path_factory):
    return make_export(tmp_path_factory.mktemp("export") / "new" / "directory", **request.param)


def gpt2(path, tokens_BxT, attended_BxT):
    """GPT-2 as its paper and code define it, in float64, from the files alone: logits [B, T, V]."""
    from safetensors.numpy import load_file

    config = json.loads((path / "config.json").read_text())
    assert config["model_type"] == "gpt2" and config["architectures"] == ["GPT2LMHeadModel"]
    w = {name: tensor.astype(np.float64) for name, tensor in load_file(path / "model.safetensors").items()}
    heads, size = config["n_head"], config["n_embd"] // config["n_head"]
    B, T = tokens_BxT.shape

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config["layer_norm_epsilon"])
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    def activate(x):
        if config["activation_function"] == "relu":
            return np.maximum(x, 0)
        assert config["activation_function"] == "gelu_new"
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    positions = np.maximum(attended_BxT.cumsum(1) - 1, 0)
    x = w["transformer.wte.weight"][tokens_BxT] + w["transformer.wpe.weight"][positions]
    mask = np.tril(np.ones((T, T), bool)) & attended_BxT[:, None, :]
    for layer in range(config["n_layer"]):
        block = f"transformer.h.{layer}"
        qkv = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").reshape(B, T, 3, heads, size)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        scores = np.where(mask[:, None], q @ k.swapaxes(-1, -2) / math.sqrt(size), -1e9)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (weights / weights.sum(-1, keepdims=True)) @ v
        x = x + linear(mixed.transpose(0, 2, 1, 3).reshape(B, T, heads * size), f"{block}.attn.c_proj")
        x = x + linear(activate(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")), f"{block}.mlp.c_proj")
    head = w["transformer.wte.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return norm(x, "transformer.ln_f") @ head.T


class TestTheFiles:
    def test_they_are_all_there(self, exported):
        assert {path.name for path in exported.path.iterdir()} == {
            *("config.json", "generation_config.json", "model.safetensors"),
            *("tokenizer.json", "tokenizer_config.json", "README.md"),
        }

    def test_gpt2_computes_what_our_decoder_does(self, exported):
        theirs = gpt2(exported.path, exported.tokens, exported.attended)
        assert theirs.shape == exported.logits.shape and np.ptp(exported.logits) > 1
        np.testing.assert_allclose(theirs[exported.attended], exported.logits[exported.attended], atol=1e-4, rtol=0)

    def test_a_ragged_batch_is_padded(self, exported):
        """Otherwise the test above would not see the mask and the positions."""
        assert exported.group.shape.ragged == (exported.padding.max() > 0)

    def test_the_tokenizer_is_ours_on_real_examples(self, exported):
        tokenizer = json.loads((exported.path / "tokenizer.json").read_text())
        vocabulary, alphabet = tokenizer["model"]["vocab"], Alphabet(exported.group.config.alphabet_size)
        assert sorted(vocabulary.values()) == list(range(alphabet.vocabulary_size)) and not tokenizer["added_tokens"]
        for row in exported.tokens:
            assert [vocabulary[character] for character in alphabet.decode_tokens(row)] == row.tolist()

    def test_the_readme_tells_what_it_is(self, exported):
        text = (exported.path / "README.md").read_text()
        (member,) = exported.group.members
        assert member.id in text and f'"width": {member.setting.width}' in text and "step" in text
        assert ("RMSNorm" in text) == (member.setting.norm == "rmsnorm")
        assert ("position_ids" in text) == exported.group.shape.ragged


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_the_norms_epsilon_is_ours(tmp_path, norm):
    """Seen where the first norm reads numbers as small as its square root."""
    small = make_export(tmp_path, embedding_scale=2e-3, norm=norm, tied_head=False)
    np.testing.assert_allclose(gpt2(small.path, small.tokens, small.attended), small.logits, atol=1e-4, rtol=0)


def test_the_doubled_stream_is_the_members_own_in_its_first_half():
    (group,) = make_groups([Member(tiny(norm="rmsnorm", biases=True), 0)])
    params = random_params(group)
    config, tensors = gpt2_checkpoint(group, params)
    D = group.config.width
    assert (config["n_embd"], config["n_head"], config["n_inner"]) == (2 * D, 2 * group.config.heads, 4 * D)
    for name, tensor in tensors.items():
        if "c_proj" in name or name.startswith(("transformer.wte", "transformer.wpe")):
            np.testing.assert_array_equal(tensor[..., :D], -tensor[..., D:])
    np.testing.assert_array_equal(tensors["transformer.wte.weight"][:, :D], params["params"]["embedding"])


def test_a_bfloat16_member_is_written_in_float32(tmp_path):
    (group,) = make_groups([Member(tiny(precision="bfloat16"), 0)])
    params = random_params(group)
    _, tensors = gpt2_checkpoint(group, params)
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype("float32")}
    write_checkpoint(tmp_path, group, group.members[0], params, step=4, diverged_at=3)
    text = (tmp_path / "README.md").read_text()
    assert "bfloat16 arithmetic" in text and "diverged at step 3" in text


class TestTransformers:
    @pytest.fixture(autouse=True)
    def _needs(self):
        for package in ("torch", "transformers"):
            pytest.importorskip(package, reason="reads the checkpoint as a user would")

    @pytest.fixture
    def model(self, exported):
        from transformers import GPT2LMHeadModel

        model, report = GPT2LMHeadModel.from_pretrained(exported.path, output_loading_info=True)
        assert not any(report.values()), report
        return model

    def test_the_logits_are_ours(self, exported, model):
        import torch

        mask = torch.tensor(exported.attended)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            theirs = model(torch.tensor(exported.tokens), attention_mask=mask.long(), position_ids=positions).logits
        ours = exported.logits[exported.attended]
        np.testing.assert_allclose(theirs.numpy()[exported.attended], ours, atol=1e-4, rtol=0)

    def test_the_tokenizer_pads_and_encodes_as_we_do(self, exported):
        from transformers import AutoTokenizer

        tokenizer, alphabet = AutoTokenizer.from_pretrained(exported.path), Alphabet(26)
        prompts = exported.tokens[:, : exported.decoder.prompt]
        texts = [alphabet.decode_tokens(row).lstrip("_") for row in prompts]
        encoded = tokenizer(texts, padding=True)
        shortest = exported.padding.min()
        np.testing.assert_array_equal(encoded["input_ids"], prompts[:, shortest:])
        np.testing.assert_array_equal(
            encoded["attention_mask"], exported.attended[:, shortest : exported.decoder.prompt]
        )
        assert set(encoded) == {"input_ids", "attention_mask"} and len(tokenizer) == alphabet.vocabulary_size
        assert tokenizer.batch_decode(encoded["input_ids"], skip_special_tokens=True) == texts
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (PAD, END)
        with pytest.raises(Exception, match="Missing"):
            tokenizer("aB#")

    def test_greedy_generation_gives_our_answers(self, exported, model):
        import torch

        prompt, width = exported.decoder.prompt, exported.decoder.sequence
        rows = exported.tokens.copy()
        for place in range(prompt, width + 1):
            logits = np.asarray(exported.decode(exported.params, rows, exported.padding))
            chosen = logits[:, place - 1].argmax(-1)
            if place < width:
                rows[:, place] = chosen
        ours = np.concatenate([rows[:, prompt:], chosen[:, None]], axis=1)
        ended = np.cumsum(ours == END, axis=1) - (ours == END) > 0
        ours = np.where(ended, PAD, ours)
        made = model.generate(
            torch.tensor(exported.tokens[:, :prompt]),
            attention_mask=torch.tensor(exported.attended[:, :prompt]).long(),
            do_sample=False,
        ).numpy()[:, prompt:]
        made = np.pad(made, [(0, 0), (0, ours.shape[1] - made.shape[1])])
        np.testing.assert_array_equal(made, ours)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run directory with two members, whose saved parameters nobody trained; and these, by step and row."""
    path, sweep = tmp_path_factory.mktemp("run"), Sweep.grid(tiny(), seeds=2)
    with RunDirectory.begin(path, sweep, Options(devices=1), overwrite=False) as directory:
        (group,) = directory.groups
        trees = {step: [random_params(group, seed=step + row) for row in range(2)] for step in (8, 16)}
        checkpoints = directory.checkpoints(group)
        for step, pair in trees.items():
            params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pair)
            state = MemberState(params=params, optimizer=(), diverged_at=jnp.array([-1, 7]))
            checkpoints.save(step, state, record={}, keep=True)
        checkpoints.wait()
        checkpoints.close()
    return SimpleNamespace(run=SavedRun(path), group=group, trees=trees, ids=[m.id for m in group.members])


class TestASavedRun:
    @pytest.mark.parametrize("step, row", [(None, 1), (8, 1), (8, 0)])
    def test_a_member_is_found_by_its_id_and_step(self, saved, tmp_path, step, row):
        from safetensors.numpy import load_file

        expected_step = step or 16
        assert export_member(saved.run, saved.ids[row], tmp_path / "out", step) == expected_step
        tensors = load_file(tmp_path / "out" / "model.safetensors")
        for name, expected in gpt2_checkpoint(saved.group, saved.trees[expected_step][row])[1].items():
            np.testing.assert_array_equal(tensors[name], expected)
        text = (tmp_path / "out" / "README.md").read_text()
        assert f"Trained for {expected_step} of 16 steps" in text and f"seed {row}" in text
        assert ("diverged at step 7" in text) == (row == 1)

    def test_the_command_does_the_same(self, saved, tmp_path):
        export_member(saved.run, saved.ids[1], tmp_path / "python", step=8)
        out = tmp_path / "command"
        asked = [f"--run_dir={saved.run.path}", f"--member={saved.ids[1]}", "--step=8", f"--out={out}"]
        done = command("experiments.export", *asked)
        assert (done.returncode, done.stdout) == (0, f"{saved.ids[1]}, step 8: {out}\n"), done.stderr
        for path in (tmp_path / "python").iterdir():
            assert (out / path.name).read_bytes() == path.read_bytes()


class TestMistakes:
    def test_a_flag_that_is_missing(self):
        done = command("experiments.export", "--run_dir=somewhere", "--out=elsewhere")
        assert done.returncode == 2 and done.stderr.startswith("error: --member: must be given")

    def test_an_unknown_member(self, saved, tmp_path):
        with pytest.raises(BadInput, match=r"^--member=m0: .* has no such member; its config\.json lists"):
            export_member(saved.run, "m0", tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_a_step_that_was_not_saved(self, saved, tmp_path):
        with pytest.raises(BadInput, match=r"^--step=3: .*saved steps: 8, 16$"):
            export_member(saved.run, saved.ids[0], tmp_path / "out", step=3)
        assert not list(tmp_path.iterdir())

    def test_no_checkpoint(self, saved, tmp_path):
        shutil.copy(saved.run.path / "config.json", tmp_path)
        with pytest.raises(BadInput, match="nothing is saved yet"):
            export_member(SavedRun(tmp_path), saved.ids[0], tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("positions", ["rotary", "none"])
    def test_positions_that_gpt2_lacks(self, positions):
        (group,) = make_groups([Member(tiny(positions=positions), 0)])
        with pytest.raises(BadInput, match=rf"^--config\.positions={positions}: .*GPT-2 has learned positions only"):
            gpt2_checkpoint(group, random_params(group))

    def test_a_directory_that_is_not_empty_keeps_what_it_has(self, saved, tmp_path):
        (tmp_path / "config.json").write_text("mine")
        with pytest.raises(BadInput, match=r"^--out=.*: is not empty, and nothing is overwritten"):
            export_member(saved.run, saved.ids[0], tmp_path)
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("config.json", "mine")]

    def test_a_file_in_the_place_of_the_directory(self, saved, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(BadInput, match=r"^--out=.*file.*: cannot be written"):
            export_member(saved.run, saved.ids[0], tmp_path / "file")

    def test_a_missing_package_is_named(self, saved, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "safetensors", None)
        monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
        with pytest.raises(BadInput, match=r"needs the package safetensors: pip install -e '\.\[export\]'$"):
            export_member(saved.run, saved.ids[0], tmp_path / "out")
        assert not list(tmp_path.iterdir())
