"""Training adapters: PyTorch with PEFT is the oracle; a population is its members, however it is laid out."""

import copy
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from instrdiv.models import lora
from instrdiv.models.llama import BLOCK_LINEAR, Adapters, Model
from instrdiv.models.lora import Lora
from instrdiv.models.weights import leaves, partition_specs, quantize
from instrdiv.runtime.checkpoints import named_leaves
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.mesh import make_mesh
from instrdiv.training import adapters as training
from instrdiv.training.adapter_trainer import AdapterTrainer, Job
from instrdiv.training.adapters import Batch
from instrdiv.training.recipe import AdapterMember, Recipe
from tests import adapters as worlds

CONFIG = worlds.CONFIG
RECIPE = Recipe(steps=4, batch_size=4, precision="float32", weight_decay=0.1, warmup_steps=1, reports=2)
MEMBERS = (
    AdapterMember(Lora(2, 4.0, ("q_proj", "v_proj")), 3e-3, seed=1),
    AdapterMember(Lora(3, 3.0, ("q_proj", "down_proj")), 1e-3, seed=2, setting={"instructions": 7}),
    AdapterMember(Lora(1, 2.0, ("lm_head", "down_proj")), 2e-2, seed=3),
)
DATA = tuple(worlds.packed(rows, seed=rows) for rows in (5, 8, 6))


def trainer(members=MEMBERS, data=DATA, recipe=RECIPE, mesh=None, restored=None, weights=None):
    weights = worlds.weights() if weights is None else weights
    return AdapterTrainer(Job(Model(CONFIG, weights), members, data, recipe, mesh or make_mesh()), restored)


def trained(*args, **options):
    """Metrics of all chunks [chunks, M, ...], and the trainer."""
    one = trainer(*args, **options)
    metrics = []
    while one.step < one.recipe.steps:
        metrics.append(jax.device_get(one.advance()))
    return jax.tree.map(lambda *parts: np.stack(parts), *metrics), one


def mean_losses(metrics):
    return metrics.losses.sum(-1) / metrics.tokens.sum(-1)


@pytest.fixture(scope="module")
def together():
    return trained()


@pytest.mark.parametrize("row", range(3))
def test_a_member_alone_is_the_member_among_others(together, row):
    """At its own rank, and with its own targets only: so padding to another rank changes nothing, either."""
    metrics, population = together
    alone_metrics, alone = trained(MEMBERS[row : row + 1], DATA[row : row + 1])
    np.testing.assert_allclose(metrics.losses[:, row], alone_metrics.losses[:, 0], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(metrics.tokens[:, row], alone_metrics.tokens[:, 0])
    adapter, expected = population.adapter(row), alone.adapter(0)
    before = lora.adapter_of(jax.device_get(trainer().state.adapters), row, MEMBERS[row].lora)
    assert adapter["down_proj" if row else "q_proj"]["b"].any()
    for name, leaf in named_leaves(adapter).items():
        np.testing.assert_allclose(leaf, named_leaves(expected)[name], atol=1e-6)
        assert not np.array_equal(leaf, named_leaves(before)[name])


def test_what_lies_beyond_rank_and_targets_stays_zero(together):
    _, population = together
    for name, pair in jax.device_get(population.state.adapters).items():
        for row, member in enumerate(MEMBERS):
            rank = member.lora.rank if name in member.lora.targets else 0
            assert not pair["a"][row, :, :, rank:].any() and not pair["b"][row, :, rank:].any()


@pytest.mark.parametrize("changes", [{"microbatch_size": 1}, {"microbatch_size": 2}, {"remat": True}], ids=str)
def test_parts_of_a_batch_and_remat_change_nothing(together, changes):
    metrics, population = together
    other_metrics, other = trained(recipe=dataclasses.replace(RECIPE, **changes))
    np.testing.assert_allclose(metrics.losses, other_metrics.losses, rtol=1e-5, atol=1e-5)
    for name, leaf in named_leaves(jax.device_get(population.state.adapters)).items():
        np.testing.assert_allclose(named_leaves(other.state.adapters)[name], leaf, atol=2e-5)


def test_the_head_in_pieces_changes_nothing(together, monkeypatch):
    """Pieces of five of the twelve places; the last one is partly padding."""
    monkeypatch.setattr(training, "LOGIT_BYTES", 4 * CONFIG.vocab_size * 12 * 5)
    metrics, _ = trained()
    np.testing.assert_allclose(metrics.losses, together[0].losses, rtol=1e-5)
    np.testing.assert_allclose(metrics.gradient_norm, together[0].gradient_norm, rtol=1e-5)


@pytest.mark.optimized
def test_logits_of_the_whole_batch_are_never_held():
    config = dataclasses.replace(CONFIG, vocab_size=5000)
    weights, member = worlds.weights(config), Lora(1, targets=("q_proj",))
    rows = worlds.packed(8, places=64)
    batch = Batch(**{f.name: getattr(rows, f.name) for f in dataclasses.fields(Batch)})

    def temporary_bytes(piece):
        def loss(adapters):
            added = Adapters(adapters, jnp.ones(1))
            return training.response_losses(Model(config, weights), RECIPE, added, batch, 2, piece)[0].sum()

        adapters = lora.init_adapters(config, [member], np.zeros(1, np.uint32))
        return jax.jit(jax.grad(loss)).lower(adapters).compile().memory_analysis().temp_size_in_bytes

    whole = 4 * config.vocab_size * 8 * 64
    assert temporary_bytes(64) > whole
    assert temporary_bytes(4) < 0.6 * whole


@pytest.mark.optimized
def test_the_base_is_not_kept_once_more_for_the_backward_pass():
    """Kernels are dequantized layer by layer: those of all layers together would be several times the base."""
    config = dataclasses.replace(CONFIG, width=64, heads=4, kv_heads=4, head_dim=16, mlp_width=256)
    weights = worlds.weights(config)
    kernels = {n: {"kernel": quantize(p["kernel"])} if n in BLOCK_LINEAR else p for n, p in weights["layers"].items()}
    batch = Batch(**{f.name: getattr(worlds.packed(2), f.name) for f in dataclasses.fields(Batch)})
    adapters = lora.init_adapters(config, [Lora(1, targets=("q_proj",))], np.zeros(1, np.uint32))

    def temporary_bytes(weights):
        def loss(adapters, weights):
            added = Adapters(adapters, jnp.ones(1))
            return training.response_losses(Model(config, weights), RECIPE, added, batch, 2)[0].sum()

        return jax.jit(jax.grad(loss)).lower(adapters, weights).compile().memory_analysis().temp_size_in_bytes

    base = sum(p["kernel"].nbytes for n, p in weights["layers"].items() if n in BLOCK_LINEAR)
    assert temporary_bytes(weights | {"layers": kernels}) < temporary_bytes(weights) + base / 2


def test_losses_are_means_over_response_tokens_of_a_source():
    """Against a plain reading of the definition: token by token, from the logits of each example by itself."""
    data, weights = DATA[1], worlds.weights()
    adapters = jax.device_get(trainer().state.adapters)
    expected, counts = np.zeros(2), np.zeros(2, int)
    for row in range(4):
        for segment in (1, 2):
            places = np.flatnonzero(data.segments[row] == segment)
            tokens = data.tokens[row, places]
            log = jax.nn.log_softmax(worlds.logits(weights, tokens[None]), axis=-1)[0]
            for place in range(1, len(places)):
                if data.loss_mask[row, places[place]]:
                    expected[data.sources[row, places[place]]] -= log[place - 1, tokens[place]]
                    counts[data.sources[row, places[place]]] += 1
    batch = Batch(**{f.name: jnp.asarray(getattr(data, f.name)[:4]) for f in dataclasses.fields(Batch)})
    adapters = {name: jax.tree.map(lambda leaf: leaf[1:2], pair) for name, pair in adapters.items()}
    added = Adapters(adapters, jnp.ones(1))
    losses, tokens = training.response_losses(Model(CONFIG, weights), RECIPE, added, batch, 2)
    np.testing.assert_array_equal(tokens[0], counts)
    np.testing.assert_allclose(losses[0], expected, rtol=1e-5)
    assert counts.min() > 0


def test_sources_of_all_members_share_their_names():
    data = [worlds.packed(source_names=("code", "prose")), worlds.packed(source_names=("poems", "code"))]
    metrics, both = trained(MEMBERS[:2], data)
    assert both.source_names == ("code", "prose", "poems")
    assert metrics.tokens[:, 0, 2].sum() == 0 and metrics.tokens[:, 1, 1].sum() == 0
    assert (metrics.tokens.sum(0)[[0, 0, 1, 1], [0, 1, 0, 2]] > 0).all()


def test_a_batch_depends_on_the_step_and_the_seed_alone():
    one, other = trainer(), trainer(MEMBERS[::-1], DATA[::-1])
    late = one.batches(2, 2)
    everything, reversed_members = one.batches(0, 4), other.batches(0, 4)
    np.testing.assert_array_equal(everything.tokens[2:], late.tokens)
    np.testing.assert_array_equal(everything.tokens[:, :, :4], reversed_members.tokens[:, :, 8:])
    # Two steps of four rows are one epoch of member 1.
    epoch = everything.tokens[:2, :, 4:8].reshape(8, -1)
    assert sorted(map(tuple, epoch)) == sorted(map(tuple, DATA[1].tokens))
    assert not np.array_equal(epoch, everything.tokens[2:, :, 4:8].reshape(8, -1))


@pytest.mark.optimized
def test_a_member_that_diverges_is_frozen_and_the_others_do_not_notice():
    calm = AdapterMember(Lora(2, 2.0), 1e-3, seed=5)
    recipe = dataclasses.replace(RECIPE, schedule="constant", warmup_steps=0)
    # 1e15: after the first update, what its adapter adds overflows; at the second step, its gradients are not finite.
    wild = dataclasses.replace(calm, learning_rate=1e15, seed=6)
    tame = dataclasses.replace(wild, learning_rate=1e-3)
    data = DATA[:2]
    metrics, one = trained([calm, wild], data, recipe)
    expected_metrics, expected = trained([calm, tame], data, recipe)
    assert jax.device_get(one.state.diverged_at).tolist() == [-1, 1]
    for name, leaf in named_leaves(jax.device_get(one.state)).items():
        np.testing.assert_array_equal(leaf[0], np.asarray(named_leaves(expected.state)[name])[0])
    np.testing.assert_array_equal(metrics.losses[:, 0], expected_metrics.losses[:, 0])
    # Frozen as it was after its first step: nothing that is not finite was written.
    _, first = trained([calm, wild], data, dataclasses.replace(recipe, steps=1, reports=1))
    for name, leaf in named_leaves(jax.device_get(one.state)).items():
        if not name.startswith("diverged_at"):
            np.testing.assert_array_equal(leaf[1], np.asarray(named_leaves(first.state)[name])[1])
    assert np.isfinite(metrics.losses[0, 1]).all() and np.isnan(metrics.gradient_norm[1, 1])


def test_a_batch_without_a_response_changes_nothing_but_the_decay():
    data = dataclasses.replace(DATA[0], loss_mask=np.zeros_like(DATA[0].loss_mask))
    data.loss_mask[4, 3] = True  # one row has a response
    recipe = dataclasses.replace(RECIPE, batch_size=1, weight_decay=0.0, warmup_steps=0)
    _, one = trained(MEMBERS[:1], [data], recipe)
    assert one.state.diverged_at.tolist() == [-1]


def test_resuming_is_bit_identical():
    _, whole = trained()
    first = trainer()
    first.advance()
    saved = first.step, {name: np.array(leaf) for name, leaf in named_leaves(first.state).items()}
    _, second = trained(restored=saved)
    assert second.step == whole.step == 4
    for name, leaf in named_leaves(jax.device_get(second.state)).items():
        np.testing.assert_array_equal(leaf, np.asarray(named_leaves(whole.state)[name]))


def test_only_adapters_and_their_optimizers_are_state():
    names = set(named_leaves(trainer(MEMBERS[:1], DATA[:1]).state))
    adapters = {f"{name}.{part}" for name in ("q_proj", "v_proj") for part in "ab"}
    moments = {f"optimizer.1.0.{moment}.{name}" for moment in ("mu", "nu") for name in adapters}
    assert names == {f"adapters.{name}" for name in adapters} | moments | {"optimizer.1.0.count", "diverged_at"}


@pytest.mark.optimized
def test_the_base_is_an_argument_and_is_held_once():
    """No array of a base kernel's shape is a constant of the program, and none has a leading axis of members."""
    one = trainer()
    lowered = one.program.lower(*one.chunk_arguments())
    text = lowered.as_text()
    assert 'stablehlo.constant dense<"0x' not in text.replace("dense_resource", 'dense<"0x')
    base = sum(leaf.nbytes for leaf in jax.tree.leaves(one.model.weights))
    others = sum(leaf.nbytes for leaf in jax.tree.leaves((one.data, one.state, one.chunk_arguments()[-1])))
    assert lowered.compile().memory_analysis().argument_size_in_bytes <= base + others + 4096


@pytest.mark.parametrize(
    ("devices", "data_parallel", "tensor_parallel", "fsdp"),
    [(2, 2, 1, False), (4, 1, 2, False), (4, 2, 1, True), (8, 2, 2, True)],
)
def test_losses_agree_on_any_mesh(together, devices, data_parallel, tensor_parallel, fsdp):
    """Three members on up to four places for members: idle ones fill them. Every device has its part of the base."""
    mesh = make_mesh(devices, data_parallel, tensor_parallel)
    specs = partition_specs(CONFIG, mesh, fsdp)

    def place(path, leaf):
        return jax.device_put(leaf, NamedSharding(mesh, specs[tuple(key.key for key in path)]))

    weights = jax.tree_util.tree_map_with_path(place, worlds.weights())
    metrics, one = trained(mesh=mesh, weights=weights)
    assert one.size % mesh.shape["member"] == 0
    np.testing.assert_allclose(mean_losses(metrics)[:, :3], mean_losses(together[0]), atol=1e-4)
    assert jax.tree.leaves(one.state.adapters)[0].sharding.spec == P("member")
    kernel = one.model.weights["layers"]["up_proj"]["kernel"]
    parts = tensor_parallel * (devices // tensor_parallel if fsdp else 1)
    assert kernel.addressable_shards[0].data.size == kernel.size // parts
    if fsdp and tensor_parallel == 1:
        # A kernel is gathered where its layer is, never those of all layers at once.
        new = trainer(mesh=mesh, weights=weights)
        text = new.program.lower(*new.chunk_arguments()).compile().as_text()
        gathered = re.findall(r"= f32\[([\d,]*)\]\S* all-gather", text)
        stacked = {",".join(map(str, one.model.weights["layers"][name]["kernel"].shape)) for name in BLOCK_LINEAR}
        assert "16,24" in gathered and "2,16,24" in stacked and not stacked & set(gathered)


def test_a_base_in_eight_bits_trains_as_the_numbers_that_it_stands_for():
    weights = worlds.weights()
    blocks = {n: {"kernel": quantize(p["kernel"])} if n in BLOCK_LINEAR else p for n, p in weights["layers"].items()}
    eight = weights | {"layers": blocks}
    meant = lora.merge(eight, MEMBERS[0].lora, {}, jnp.float32)
    metrics, one = trained(MEMBERS[:1], DATA[:1], weights=eight)
    expected, _ = trained(MEMBERS[:1], DATA[:1], weights=meant)
    np.testing.assert_allclose(metrics.losses, expected.losses, rtol=1e-4)
    assert one.model.weights["layers"]["q_proj"]["kernel"].values.dtype == jnp.int8
    assert np.abs(metrics.losses - trained(MEMBERS[:1], DATA[:1])[0].losses).max() > 1e-3


def test_training_is_what_pytorch_and_peft_do(tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    model = worlds.transformers_model()
    weights = worlds.weights_of(model)
    member = AdapterMember(Lora(3, 5.0, "all-linear"), 2e-2, seed=4)
    recipe = dataclasses.replace(RECIPE, steps=5, reports=5, schedule="constant", warmup_steps=0, clip=0.5)
    data = dataclasses.replace(copy.deepcopy(DATA[1]), source_names=("all",))
    # One example a row: packing is not what is compared.
    data.tokens[:] = worlds.tokens(*data.tokens.shape, seed=9)
    data.segments[:], data.positions[:] = 1, np.arange(data.tokens.shape[1])
    data.loss_mask[:, 0] = False
    data.sources[:] = 0
    one = trainer([member], [data], recipe, weights=weights)
    lora.write_adapter(tmp_path, CONFIG, member.lora, one.adapter(0))
    theirs = peft.PeftModel.from_pretrained(model, tmp_path, is_trainable=True)
    trainable = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=2e-2, betas=(0.9, 0.999), weight_decay=0.1)
    ours, expected = [], []
    for step in range(5):
        batch = jax.tree.map(lambda leaf: leaf[0, 0], one.batches(step, 1))
        metrics = jax.device_get(one.advance())
        ours.append(metrics.losses.sum() / metrics.tokens.sum())
        tokens = torch.tensor(batch.tokens, dtype=torch.long)
        labels = torch.where(torch.tensor(batch.loss_mask), tokens, -100)
        loss = theirs(tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trainable, 0.5)
        np.testing.assert_allclose(metrics.gradient_norm[0], norm.item(), rtol=1e-4)
        optimizer.step()
        expected.append(loss.item())
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert expected[-1] < expected[0] - 0.1


def test_bfloat16_is_near_float32(together):
    metrics, _ = trained(recipe=dataclasses.replace(RECIPE, precision="bfloat16"))
    difference = np.abs(mean_losses(metrics) - mean_losses(together[0]))
    assert 0 < difference.max() < 0.1


def test_a_shorter_last_chunk_ends_with_the_schedule():
    metrics, one = trained(recipe=dataclasses.replace(RECIPE, steps=3, reports=2))
    assert one.step == 3 and len(metrics.losses) == 2
    assert one.recipe.chunk_steps == 2


def test_ids_are_stable():
    assert [member.id for member in MEMBERS] == ["a713e3a1ab", "a25e25ef3a", "a75832f268"]
    assert AdapterMember(Lora(2, 4, ["v_proj", "q_proj"]), 3e-3, 1).id == MEMBERS[0].id
    assert len({member.id for member in (*MEMBERS, dataclasses.replace(MEMBERS[0], setting={"a": 1}))}) == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recipe": {"microbatch_size": 3}}, "--config.microbatch_size=3: must divide --config.batch_size=4"),
        ({"recipe": {"schedule": "step"}}, "--config.schedule=step: must be one of linear, cosine, constant"),
        ({"recipe": {"warmup_steps": 9}}, "--config.warmup_steps=9: must not exceed --config.steps=4"),
        ({"recipe": {"attention": "cudnn"}}, "--config.attention=cudnn: needs an NVIDIA GPU"),
        ({"recipe": {"clip": float("nan")}}, "--config.clip=nan"),
        ({"member": {"learning_rate": float("inf")}}, "--learning_rate=inf"),
        ({"member": {"seed": -1}}, "seeds must be whole numbers"),
        ({"data": {"loss_mask": np.zeros((5, 12), bool)}}, "have no response"),
        ({"data": {"tokens": np.full((5, 12), 40)}}, "have token 40, but the model's vocabulary has 40"),
        ({"data": {"tokens": np.zeros((5, 11), np.int32)}}, "rows are 11 and 12 tokens long"),
    ],
)
def test_what_does_not_fit_is_one_line(changes, words):
    recipe = dataclasses.replace(RECIPE, **changes.get("recipe", {}))
    members = [dataclasses.replace(MEMBERS[0], **changes.get("member", {})), *MEMBERS[1:]]
    data = [dataclasses.replace(DATA[0], **changes.get("data", {})), *DATA[1:]]
    with pytest.raises(BadInput, match=words) as error:
        trainer(members, data, recipe)
    assert "\n" not in str(error.value)


def test_layouts_that_do_not_come_out_even():
    with pytest.raises(BadInput, match="--devices=99: this machine has 8"):
        make_mesh(99)
    with pytest.raises(BadInput, match="--devices=4: must be a multiple of --data_parallel=3"):
        make_mesh(4, 3)
    with pytest.raises(BadInput, match="--data_parallel=8: must divide the 4 rows"):
        trainer(mesh=make_mesh(8, 8))
    with pytest.raises(BadInput, match="two members are identical"):
        trainer(members=[MEMBERS[0]] * 3)


@pytest.mark.optimized
def test_the_step_compiles_at_the_shape_of_llama_2_7b():
    """With shapes alone, as P1 trains it (rank 512, 8-bit base): the base is there once, each member adds its own."""
    sizes = {"vocab_size": 32_000, "width": 4096, "layers": 32, "heads": 32, "kv_heads": 32, "head_dim": 128}
    config = dataclasses.replace(CONFIG, **sizes, mlp_width=11_008, windows=(None,) * 32)
    weights: dict = {}
    for leaf in leaves(config):
        shape = leaf.shape if leaf.layers is None else (leaf.layers, *leaf.shape)
        value = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        if leaf.is_kernel and leaf.layers:
            value = jax.eval_shape(quantize, value)
        *parents, last = leaf.path
        node = weights
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    members = [Lora(512, 1024.0, ("q_proj", "v_proj"))] * 3
    recipe = Recipe(batch_size=64, microbatch_size=8, remat=True, precision="bfloat16")
    state = jax.eval_shape(
        lambda seeds: training.init_state(config, recipe, members, seeds), jax.ShapeDtypeStruct((3,), jnp.uint32)
    )
    rows = {f.name: jax.ShapeDtypeStruct((recipe.parts, 3 * 8, 96), jnp.int32) for f in dataclasses.fields(Batch)}
    numbers = training.MemberData(*[jax.ShapeDtypeStruct((3,), jnp.float32)] * 2)

    def step(weights, data, state, number, batch):
        batch = batch.replace(loss_mask=batch.loss_mask > 0)
        return training.train_step(Model(config, weights), recipe, 1, 16, data, state, number, batch)

    program = jax.jit(step, donate_argnums=2).lower(
        weights, numbers, state, jax.ShapeDtypeStruct((), jnp.int32), Batch(**rows)
    )
    memory = program.compile().memory_analysis()
    adapter = 512 * 2 * 32 * (4096 + 4096)
    expected = 6.48e9 + 4 * 32_000 * 4096 + 3 * 12 * adapter  # kernels a byte each; embedding and head two; 12 a number
    assert memory.argument_size_in_bytes == pytest.approx(expected, rel=0.01)
