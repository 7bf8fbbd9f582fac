"""Weights: checkpoints that safetensors wrote are read, sharded and quantized correctly; errors name the problem."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from instrdiv.models.llama import BLOCK_LINEAR, Model, Quantized, Rows, hidden, logits
from instrdiv.models.llama_config import ModelConfig
from instrdiv.models.weights import leaves, partition_specs, quantize, read_weights, write_weights
from instrdiv.runtime.errors import BadInput
from tests import adapters as worlds

CONFIG = dataclasses.replace(
    worlds.CONFIG, layers=3, windows=(None, None, None), qkv_bias=True, output_bias=True, mlp_bias=True
)
QWEN = dataclasses.replace(
    CONFIG, architecture="Qwen2ForCausalLM", output_bias=False, mlp_bias=False, tied_head=True, end_tokens=(3, 7)
)
NAME = "model.layers.1.self_attn.q_proj.weight"


def shapes(config):
    """name -> shape of every tensor in a checkpoint, written out."""
    heads, kv_heads = config.heads * config.head_dim, config.kv_heads * config.head_dim
    found = {"model.embed_tokens.weight": (config.vocab_size, config.width), "model.norm.weight": (config.width,)}
    if not config.tied_head:
        found["lm_head.weight"] = (config.vocab_size, config.width)
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}."
        found[prefix + "input_layernorm.weight"] = found[prefix + "post_attention_layernorm.weight"] = (config.width,)
        for name, (out, inputs), bias in (
            ("self_attn.q_proj", (heads, config.width), config.qkv_bias),
            ("self_attn.k_proj", (kv_heads, config.width), config.qkv_bias),
            ("self_attn.v_proj", (kv_heads, config.width), config.qkv_bias),
            ("self_attn.o_proj", (config.width, heads), config.output_bias),
            ("mlp.gate_proj", (config.mlp_width, config.width), config.mlp_bias),
            ("mlp.up_proj", (config.mlp_width, config.width), config.mlp_bias),
            ("mlp.down_proj", (config.width, config.mlp_width), config.mlp_bias),
        ):
            found[f"{prefix}{name}.weight"] = (out, inputs)
            if bias:
                found[f"{prefix}{name}.bias"] = (out,)
    return found


def tensors(config=CONFIG, dtype=np.float32):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes(config).items()}


def write(directory, config=CONFIG, numbers=None, files=1):
    """Writes a checkpoint with the safetensors library; if ``files`` > 1, as several files with an index."""
    numbers = tensors(config) if numbers is None else numbers
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config.to_json()))
    if files == 1:
        save_file(numbers, directory / "model.safetensors")
        return directory
    places = {name: f"model-{i % files + 1:05}-of-{files:05}.safetensors" for i, name in enumerate(numbers)}
    for file in set(places.values()):
        save_file({name: numbers[name] for name in numbers if places[name] == file}, directory / file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def expected(numbers, config=CONFIG):
    """The tree, built independently: by parsing the names and stacking the layers."""
    tree = {"embed": numbers["model.embed_tokens.weight"], "norm": numbers["model.norm.weight"], "layers": {}}
    if not config.tied_head:
        tree["lm_head"] = {"kernel": numbers["lm_head.weight"].T}
    for name in numbers:
        match = re.fullmatch(r"model\.layers\.0\.(?:self_attn\.|mlp\.)?(\w+)\.(weight|bias)", name)
        if not match:
            continue
        stacked = np.stack([numbers[name.replace(".0.", f".{layer}.")] for layer in range(config.layers)])
        what, part = match.groups()
        if "layernorm" in what:
            tree["layers"][{"input_layernorm": "input_norm"}.get(what, "post_norm")] = stacked
        elif part == "bias":
            tree["layers"].setdefault(what, {})["bias"] = stacked
        else:
            tree["layers"].setdefault(what, {})["kernel"] = stacked.transpose(0, 2, 1)
    return tree


def assert_same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), tree, other)


def mesh(member=1, data=1, tensor=1):
    count = member * data * tensor
    return Mesh(np.array(jax.devices()[:count]).reshape(member, data, tensor), ("member", "data", "tensor"))


@pytest.mark.parametrize("config", [CONFIG, QWEN], ids=["llama", "qwen"])
@pytest.mark.parametrize("files", [1, 3])
def test_every_tensor_comes_to_its_place(tmp_path, config, files):
    numbers = tensors(config)
    tree = read_weights(write(tmp_path, config, numbers, files), config)
    assert_same(tree, expected(numbers, config))
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {np.dtype("float32")}


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("held", ["float32", "bfloat16"])
def test_files_and_weights_have_any_dtype(tmp_path, stored, held):
    numbers = tensors(dtype=jnp.dtype(stored))
    tree = read_weights(write(tmp_path, numbers=numbers), CONFIG, held)
    as_held = {name: tensor.astype(jnp.dtype(held)) for name, tensor in numbers.items()}
    assert_same(tree, expected(as_held))
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(held)}


def test_weights_do_not_change_when_the_file_does(tmp_path):
    numbers = tensors(QWEN)
    tree = read_weights(write(tmp_path, QWEN, numbers), QWEN)
    with open(tmp_path / "model.safetensors", "r+b") as file:
        size = file.seek(0, 2)
        file.seek(0)
        file.write(b"\0" * size)
    assert_same(tree, expected(numbers, QWEN))


def test_what_old_checkpoints_have_besides_is_ignored(tmp_path):
    extra = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32) for layer in range(3)}
    assert_same(read_weights(write(tmp_path, numbers=tensors() | extra), CONFIG), expected(tensors()))


def test_a_tied_head_may_be_written_twice(tmp_path):
    numbers = tensors(QWEN)
    numbers["lm_head.weight"] = numbers["model.embed_tokens.weight"].copy()
    assert_same(read_weights(write(tmp_path / "same", QWEN, numbers), QWEN), expected(numbers, QWEN))
    numbers["lm_head.weight"][3, 4] += 1
    with pytest.raises(BadInput, match=r"lm_head\.weight differs from the embedding.*tie_word_embeddings=false"):
        read_weights(write(tmp_path / "other", QWEN, numbers), QWEN)


class TestQuantized:
    def test_it_is_symmetric_by_output_channel(self):
        kernel = np.array([[[1.0, -3.0, 0.0], [-0.5, 1.5, 0.0]]], np.float32)
        values, scale = quantize(jnp.asarray(kernel))
        np.testing.assert_array_equal(values, [[[127, -127, 0], [-64, 64, 0]]])  # -63.5 and 63.5 round to even
        np.testing.assert_allclose(scale, [[[1 / 127, 3 / 127, 1.0]]], rtol=1e-6)
        assert values.dtype == jnp.int8 and scale.dtype == jnp.float32

    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    def test_only_the_kernels_of_the_layers_are(self, tmp_path, precision):
        numbers = tensors()
        tree = read_weights(write(tmp_path, numbers=numbers), CONFIG, precision, int8=True)
        whole = expected(numbers)
        for name in BLOCK_LINEAR:
            kernel, original = tree["layers"][name].pop("kernel"), whole["layers"][name].pop("kernel")
            assert isinstance(kernel, Quantized) and kernel.values.dtype == jnp.int8
            np.testing.assert_allclose(kernel.scale, np.abs(original).max(1, keepdims=True) / 127, rtol=1e-6)
            off = np.abs(np.asarray(kernel.values, np.float32) * np.asarray(kernel.scale) - original)
            assert (off <= np.asarray(kernel.scale) * 0.5001).all() and off.max() > 0
        assert_same(tree, jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(precision)), whole))


class TestOnAMesh:
    def read(self, tmp_path, mesh, fsdp, config=CONFIG, **options):
        numbers = tensors(config)
        tree = read_weights(write(tmp_path, config, numbers), config, mesh=mesh, fsdp=fsdp, **options)
        return tree, numbers

    @pytest.mark.parametrize("axes", [{"tensor": 2}, {"member": 2, "data": 2, "tensor": 2}, {"data": 4}])
    @pytest.mark.parametrize("fsdp", [False, True])
    def test_the_numbers_are_the_same(self, tmp_path, axes, fsdp):
        tree, numbers = self.read(tmp_path, mesh(**axes), fsdp)
        assert_same(tree, expected(numbers))

    @pytest.mark.parametrize("fsdp", [False, True])
    def test_the_logits_are_the_same(self, tmp_path, fsdp):
        tokens = np.random.default_rng(1).integers(0, 40, (4, 9), np.int32)
        rows = Rows(tokens, np.broadcast_to(np.arange(9, dtype=np.int32), (4, 9)), np.ones((4, 9), np.int32))

        @jax.jit
        def compute(tree, rows):
            return logits(Model(CONFIG, tree), hidden(Model(CONFIG, tree), rows)[0])

        spread, numbers = self.read(tmp_path, mesh(member=2, data=2, tensor=2), fsdp)
        np.testing.assert_allclose(compute(spread, rows), compute(expected(numbers), rows), atol=1e-4, rtol=1e-5)

    def test_eight_bits_are_the_same(self, tmp_path):
        spread, _ = self.read(tmp_path, mesh(member=2, data=2, tensor=2), True, int8=True)
        alone = read_weights(tmp_path, CONFIG, int8=True)
        assert_same(spread, alone)
        kernel = spread["layers"]["down_proj"]["kernel"]
        assert kernel.values.addressable_shards[0].data.shape == (3, 12, 4)
        assert kernel.scale.addressable_shards[0].data.shape == (3, 1, 4)

    def test_a_device_holds_its_part(self, tmp_path):
        tree, _ = self.read(tmp_path, mesh(member=2, data=2, tensor=2), True)
        held = jax.tree.map(lambda leaf: leaf.addressable_shards[0].data.shape, tree)
        layers = held["layers"]
        assert held["embed"] == (20, 4) and held["lm_head"]["kernel"] == (4, 20) and held["norm"] == (16,)
        assert layers["q_proj"] == {"kernel": (3, 4, 8), "bias": (3, 8)}
        assert layers["k_proj"] == layers["v_proj"] == {"kernel": (3, 4, 4), "bias": (3, 4)}
        assert layers["o_proj"] == {"kernel": (3, 8, 4), "bias": (3, 16)}
        assert layers["gate_proj"] == layers["up_proj"] == {"kernel": (3, 4, 12), "bias": (3, 12)}
        assert layers["down_proj"] == {"kernel": (3, 12, 4), "bias": (3, 16)}
        assert layers["input_norm"] == layers["post_norm"] == (3, 16)

    def test_key_heads_and_a_vocabulary_that_do_not_divide_are_whole(self):
        specs = partition_specs(dataclasses.replace(CONFIG, vocab_size=42), mesh(tensor=4))
        assert specs["layers", "k_proj", "kernel"] == P(None, None, None)
        assert specs["layers", "q_proj", "kernel"] == P(None, None, "tensor")
        assert specs["embed",] == P(None, None) and specs["lm_head", "kernel"] == P(None, None)

    def test_a_mesh_may_lack_axes(self):
        two = Mesh(np.array(jax.devices()[:2]).reshape(2, 1), ("member", "data"))
        assert set(partition_specs(CONFIG, two).values()) <= {P(), P(None), P(None, None), P(None, None, None)}
        assert partition_specs(CONFIG, two, fsdp=True)["embed",] == P(None, ("member", "data"))

    def test_a_mesh_that_does_not_fit_is_refused(self):
        with pytest.raises(BadInput, match=r"^--tensor_parallel=8: must divide the 4 attention heads$"):
            partition_specs(CONFIG, mesh(tensor=8))
        with pytest.raises(BadInput, match=r"^--tensor_parallel=4: must divide the 22 channels of the MLP$"):
            partition_specs(dataclasses.replace(CONFIG, mlp_width=22), mesh(tensor=4))
        with pytest.raises(BadInput, match=r"^--fsdp: the width 16 cannot be split into 3 equal parts"):
            partition_specs(CONFIG, mesh(data=3), fsdp=True)


class TestWriting:
    @pytest.mark.parametrize("config", [CONFIG, QWEN], ids=["llama", "qwen"])
    def test_the_library_reads_what_was_read(self, tmp_path, config):
        numbers = tensors(config)
        tree = read_weights(write(tmp_path / "there", config, numbers), config)
        write_weights(tmp_path / "new" / "here", config, tree, "float32")
        read = load_file(tmp_path / "new" / "here" / "model.safetensors")
        assert read.keys() == numbers.keys()
        for name, tensor in numbers.items():
            np.testing.assert_array_equal(read[name], tensor)
        assert ModelConfig.from_json(tmp_path / "new" / "here") == config

    def test_in_bfloat16_and_from_a_mesh(self, tmp_path):
        numbers = tensors(dtype=jnp.bfloat16)
        tree = read_weights(write(tmp_path / "there", numbers=numbers), CONFIG, "bfloat16", mesh=mesh(2, 2, 2))
        write_weights(tmp_path / "here", CONFIG, tree)
        read = load_file(tmp_path / "here" / "model.safetensors")
        for name, tensor in numbers.items():
            assert read[name].dtype == jnp.bfloat16
            np.testing.assert_array_equal(read[name], tensor)
        assert json.loads((tmp_path / "here" / "config.json").read_text())["torch_dtype"] == "bfloat16"

    def test_eight_bits_as_the_numbers_that_they_stand_for(self, tmp_path):
        tree = read_weights(write(tmp_path / "there"), CONFIG, int8=True)
        write_weights(tmp_path / "here", CONFIG, tree, "float32")
        kernel = tree["layers"]["q_proj"]["kernel"]
        stands_for = np.asarray(kernel.values, np.float32)[1] * np.asarray(kernel.scale)[1]
        np.testing.assert_array_equal(load_file(tmp_path / "here" / "model.safetensors")[NAME], stands_for.T)

    def test_nothing_is_overwritten(self, tmp_path):
        tree = read_weights(write(tmp_path), CONFIG)
        with pytest.raises(BadInput, match=f"^{tmp_path}: is not empty"):
            write_weights(tmp_path, CONFIG, tree)
        (tmp_path / "file").write_text("")
        with pytest.raises(BadInput, match="cannot be written"):
            write_weights(tmp_path / "file" / "below", CONFIG, tree)


class TestWhatIsWrong:
    def refused(self, directory, config=CONFIG):
        with pytest.raises(BadInput) as error:
            read_weights(directory, config)
        assert "\n" not in str(error.value)
        return str(error.value)

    def test_a_missing_shard(self, tmp_path):
        lost = write(tmp_path, files=3) / "model-00002-of-00003.safetensors"
        lost.unlink()
        assert self.refused(tmp_path).startswith(f"{lost}: is missing; according to model.safetensors.index.json, it")

    def test_a_shard_without_a_tensor_that_the_index_names(self, tmp_path):
        path = write(tmp_path, files=3) / "model-00001-of-00003.safetensors"
        numbers = load_file(path)
        lost = sorted(numbers)[0]
        save_file({name: tensor for name, tensor in numbers.items() if name != lost}, path)
        assert self.refused(tmp_path).startswith(f"{path}: lacks the tensor {lost}, which")

    @pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"a": "../b"}}', '{"weight_map": {"a": 3}}'])
    def test_an_index_that_is_none(self, tmp_path, text):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        assert self.refused(tmp_path).startswith(f"{tmp_path / 'model.safetensors.index.json'}: cannot be read (")

    def test_a_file_that_was_cut_short(self, tmp_path):
        path = write(tmp_path) / "model.safetensors"
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
        last = max((e["data_offsets"][1], name) for name, e in header.items())[1]
        said = f"{path}: is damaged: its tensor {last} ends at byte {len(whole)}, but the file ends at {len(whole) - 1}"
        assert self.refused(tmp_path).startswith(said)
        for size in (0, 7, 8, 100):
            path.write_bytes(whole[:size])
            assert self.refused(tmp_path).startswith(f"{path}: is damaged or not a safetensors file (")

    @pytest.mark.parametrize(
        "header",
        [b"no json", b"[1]", b'{"a": 3}', b'{"a": {"dtype": "F32", "shape": [1]}}',
         b'{"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}',
         b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4]}}',
         b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}'],
    )  # fmt: skip
    def test_a_header_that_is_none(self, tmp_path, header):
        path = tmp_path / "model.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        assert self.refused(tmp_path).startswith(f"{path}: is damaged or not a safetensors file (")

    def test_a_shape_that_its_bytes_do_not_have(self, tmp_path):
        path = write(tmp_path) / "model.safetensors"
        content = path.read_bytes()
        assert b'"shape":[40,16]' in content
        path.write_bytes(content.replace(b'"shape":[40,16]', b'"shape":[40,17]'))
        assert re.search(r"its tensor \S+ of \[40, 17\] F32 has 2560 bytes", self.refused(tmp_path))

    def test_a_pointer_of_git_lfs(self, tmp_path):
        (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        assert "git lfs pull" in self.refused(tmp_path)

    def test_a_missing_tensor(self, tmp_path):
        numbers = tensors()
        del numbers[NAME]
        said = f"{write(tmp_path, numbers=numbers)}: lacks the tensor {NAME} [16, 16], which its config.json"
        assert self.refused(tmp_path).startswith(said)

    def test_a_tensor_too_many(self, tmp_path):
        path = write(tmp_path, numbers=tensors()) / "model.safetensors"
        shallow = dataclasses.replace(CONFIG, layers=2, windows=(None, None))
        assert self.refused(tmp_path, shallow).startswith(f"{path}: tensor model.layers.2.")

    def test_a_wrong_shape(self, tmp_path):
        numbers = tensors() | {NAME: np.zeros((16, 15), np.float32)}
        path = write(tmp_path, numbers=numbers) / "model.safetensors"
        said = f"{path}: tensor {NAME} has shape [16, 15], but config.json requires [16, 16]"
        assert self.refused(tmp_path) == said

    def test_a_dtype_that_is_not_supported(self, tmp_path):
        path = write(tmp_path, numbers=tensors() | {NAME: np.zeros((16, 16), np.int8)}) / "model.safetensors"
        assert self.refused(tmp_path) == f"{path}: tensor {NAME} is I8; supported are F32, F16, BF16"

    @pytest.mark.parametrize("number", [np.nan, -np.inf])
    def test_numbers_that_are_not_finite(self, tmp_path, number):
        numbers = tensors(dtype=jnp.bfloat16)
        numbers[NAME][3, 4] = number
        path = write(tmp_path, numbers=numbers, files=2) / "model-00001-of-00002.safetensors"
        path = path if NAME in load_file(path) else path.with_name("model-00002-of-00002.safetensors")
        assert self.refused(tmp_path).startswith(f"{path}: is damaged: its tensor {NAME} has non-finite values")

    def test_pickled_weights(self, tmp_path):
        (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
        said = self.refused(tmp_path)
        assert said.startswith(f"{tmp_path / 'pytorch_model-00001-of-00002.bin'}: pickled weights are not read")
        assert "from_pretrained(DIRECTORY).save_pretrained(NEW_DIRECTORY)" in said

    def test_nothing(self, tmp_path):
        assert self.refused(tmp_path).startswith(f"{tmp_path}: has neither model.safetensors nor model.safetensors.i")
        assert self.refused(tmp_path / "no") == f"{tmp_path / 'no'}: there is no such directory"


def test_the_table_has_a_place_for_every_tensor_that_is_spelled_out_here():
    for config in (CONFIG, QWEN):
        assert {n: leaf.stored_shape for leaf in leaves(config) for n in leaf.names()} == shapes(config)
