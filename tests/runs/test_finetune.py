"""Whole fine-tuning runs: what they leave behind, and that an interrupted one ends as if it had not been."""

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instrdiv.models import lora
from instrdiv.models.llama import Model
from instrdiv.models.lora import Lora
from instrdiv.runs import finetune as run
from instrdiv.runs.finetune import finetune
from instrdiv.runtime.checkpoints import Checkpoints, Schedule
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.interruption import Interrupted
from instrdiv.runtime.mesh import make_mesh
from instrdiv.runtime.tables import read_table
from instrdiv.training.adapter_trainer import AdapterTrainer
from instrdiv.training.recipe import AdapterMember, Recipe
from tests import adapters as worlds

CONFIG = worlds.CONFIG
RECIPE = Recipe(steps=6, batch_size=2, precision="float32", reports=3)
MEMBERS = (
    AdapterMember(Lora(2, 4.0, ("q_proj",)), 3e-3, seed=0, setting={"instructions": 4}),
    AdapterMember(Lora(1, 4.0, ("q_proj",)), 3e-3, seed=1, setting={"instructions": 9}),
)
DATA = (worlds.packed(seed=1), worlds.packed(seed=2, source_names=("prose", "poems")))
WEIGHTS = worlds.weights()


def start(run_dir=None, members=MEMBERS, data=DATA, recipe=RECIPE, weights=WEIGHTS, **options):
    options = {"progress": False, "base": "tiny"} | options
    return finetune(Model(CONFIG, weights), members, data, recipe, run_dir=run_dir, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "run"
    return path, start(path)


def adapters_of(path):
    return {m.id: lora.read_adapter(path / "adapters" / m.id, CONFIG) for m in MEMBERS}


def files_of(path):
    """What must not hang on how often a run was interrupted."""
    names = ["metrics.csv", "source_losses.csv", "config.json"]
    names += [f"adapters/{m.id}/adapter_model.safetensors" for m in MEMBERS]
    return {name: (path / name).read_bytes() for name in names}


def test_tables_say_what_was_trained(finished):
    path, done = finished
    metrics = read_table(path / "metrics.csv", run.ADAPTER_METRIC_COLUMNS)
    assert [(row["member"], row["step"]) for row in metrics] == [(m.id, s) for s in (2, 4, 6) for m in MEMBERS]
    assert {row["examples_seen"] for row in metrics if row["step"] == 4} == {8}
    assert all(row["status"] == "ok" and np.isfinite(row["loss"]) for row in metrics)
    sources = read_table(path / "source_losses.csv", run.SOURCE_COLUMNS)
    for row in metrics:
        parts = [part for part in sources if (part["member"], part["step"]) == (row["member"], row["step"])]
        tokens = [part["response_tokens"] for part in parts]
        assert sum(tokens) == row["response_tokens"]
        assert np.average([part["loss"] for part in parts], weights=tokens) == pytest.approx(row["loss"], rel=1e-5)
    assert {row["source"] for row in sources if row["seed"] == 0} == {"code", "prose"}
    assert {row["source"] for row in sources if row["seed"] == 1} == {"prose", "poems"}
    timings = read_table(path / "timings.csv")
    assert [row["compiled"] for row in timings] == [1, 0, 0]
    assert timings[1]["tokens_per_second"] == pytest.approx(12 * timings[1]["examples_per_second"])
    said = json.loads((path / "config.json").read_text())
    assert said["recipe"]["steps"] == 6 and said["members"][1]["instructions"] == 9
    provenance = json.loads((path / "provenance.json").read_text())
    assert provenance["mesh"] == {"member": 1, "data": 1, "tensor": 1} and provenance["peak_host_bytes"] > 0
    assert len(done.metrics) == len(metrics)


def test_adapters_are_written_as_they_were_trained(finished):
    path, done = finished
    for member in MEMBERS:
        read, adapter = adapters_of(path)[member.id]
        assert read == member.lora and adapter["q_proj"]["b"].any()
        jax.tree.map(np.testing.assert_array_equal, adapter, done.adapters[member.id])
    stacked, scale = done.population(CONFIG)
    assert scale.tolist() == [2.0, 4.0] and stacked["q_proj"]["a"].shape == (2, 2, 16, 2)


def test_a_finished_run_is_read_back(finished, monkeypatch):
    path, done = finished
    before = files_of(path)
    monkeypatch.setattr(AdapterTrainer, "advance", None)
    again = start(path)
    assert files_of(path) == before
    assert again.metrics == read_table(path / "metrics.csv")
    jax.tree.map(np.testing.assert_array_equal, again.adapters, done.adapters)


def test_without_a_directory_the_result_is_the_same(finished):
    _, done = finished
    other = start()
    assert other.metrics == done.metrics and other.source_losses == done.source_losses
    jax.tree.map(np.testing.assert_array_equal, other.adapters, done.adapters)


def test_a_signal_saves_and_the_same_call_resumes_bit_for_bit(finished, tmp_path, monkeypatch):
    path, advance = finished[0], AdapterTrainer.advance

    def advance_and_interrupt(self):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return advance(self)

    monkeypatch.setattr(AdapterTrainer, "advance", advance_and_interrupt)
    with pytest.raises(Interrupted, match=r"Checkpoint saved at group adapters, step 4 of 6. Rerun the same command"):
        start(tmp_path / "run", schedule=Schedule(minutes=float("inf")))
    assert {row["step"] for row in read_table(tmp_path / "run" / "metrics.csv")} == {2, 4}
    assert not (tmp_path / "run" / "adapters").exists()
    monkeypatch.setattr(AdapterTrainer, "advance", advance)
    start(tmp_path / "run")
    assert files_of(tmp_path / "run") == files_of(path)
    assert len(json.loads((tmp_path / "run" / "provenance.json").read_text())["earlier_launches"]) == 1


def test_a_checkpoint_has_no_base_weight(finished):
    path, _ = finished
    read = Checkpoints(path / "checkpoints" / "adapters").latest()
    assert read.step == 6
    own = {"adapters.q_proj.a", "adapters.q_proj.b", "diverged_at"}
    assert {name for name in read.arrays if not name.startswith("optimizer.")} == own
    assert {name.rpartition(".q_proj.")[0] for name in read.arrays if ".q_proj." in name} == {
        *("adapters", "optimizer.1.0.mu", "optimizer.1.0.nu")
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recipe": dataclasses.replace(RECIPE, steps=8)}, r"a different run \(recipe.steps: 6 saved, 8 requested"),
        ({"data": (DATA[1], DATA[1])}, r"a different run \(member 0.data: \w+ saved, \w+ requested"),
        ({"members": MEMBERS[:1], "data": DATA[:1]}, r"a different run \(members: 2 saved, 1 requested"),
        (
            {"members": (MEMBERS[0], dataclasses.replace(MEMBERS[1], learning_rate=1e-2))},
            r"a different run \(member 1.learning_rate: 0.003 saved, 0.01 requested",
        ),
        ({"weights": worlds.weights(seed=1)}, r"a different run \(base.weights: \w+ saved"),
        ({"figure": "other"}, r"a different run \(figure: finetuning saved, other requested"),
    ],
)
def test_another_run_is_refused_by_name(finished, changes, words):
    path, _ = finished
    before = files_of(path)
    with pytest.raises(BadInput, match=words) as error:
        start(path, **changes)
    assert "\n" not in str(error.value) and files_of(path) == before


def test_overwrite_starts_from_scratch(finished, tmp_path):
    short = dataclasses.replace(RECIPE, steps=2, reports=1)
    start(tmp_path / "run", recipe=short)
    (tmp_path / "run" / "results.csv").write_text("what a launcher found of the run that was here\n")
    start(tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / "results.csv").exists()
    assert files_of(tmp_path / "run") == files_of(finished[0])


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(BadInput, match="is not empty and holds no run"):
        start(tmp_path, overwrite=True)
    (tmp_path / "thesis.tex").rename(tmp_path / "config.json")
    with pytest.raises(BadInput, match=r"config.json cannot be read"):
        start(tmp_path)


def test_a_mistake_leaves_nothing_behind(tmp_path):
    with pytest.raises(BadInput, match=r"--config.clip"):
        start(tmp_path / "run", recipe=dataclasses.replace(RECIPE, clip=0.0))
    assert not (tmp_path / "run").exists()


def test_a_member_that_diverges_is_told(tmp_path, capsys):
    wild = dataclasses.replace(MEMBERS[1], learning_rate=1e30)
    recipe = dataclasses.replace(RECIPE, schedule="constant")
    done = start(tmp_path / "run", (MEMBERS[0], wild), recipe=recipe)
    assert [row["status"] for row in done.metrics if row["member"] == wild.id][-1] == "diverged at step 0"
    assert np.isnan([row["loss"] for row in done.metrics if row["member"] == wild.id][-1])
    assert [row["status"] for row in done.metrics if row["member"] == MEMBERS[0].id] == ["ok"] * 3
    assert f"member {wild.id} (seed 1) diverged at step 0: it is frozen" in capsys.readouterr().err


def test_the_digest_of_the_base_sees_every_change_and_no_layout():
    weights = worlds.weights(dtype=jnp.bfloat16)
    digest = run.weights_digest(weights)
    changed = jax.tree.map(jnp.copy, weights)
    changed["layers"]["q_proj"]["kernel"] = changed["layers"]["q_proj"]["kernel"].at[1, 2, 3].add(1)
    swapped = weights | {"embed": weights["embed"][::-1]}
    mesh = make_mesh(2, 1, 2)
    spread = jax.device_put(weights, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    columns = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "tensor"))
    spread["embed"] = jax.device_put(weights["embed"], columns)
    assert run.weights_digest(spread) == digest
    assert len({digest, run.weights_digest(changed), run.weights_digest(swapped)}) == 3
