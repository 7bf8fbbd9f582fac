"""Whole runs: what they leave behind, that they repeat exactly, and what they refuse."""

import dataclasses
import json
import shutil
import sys
import types

import jax
import numpy as np
import pytest

import instrdiv
from instrdiv.config.layout import Options
from instrdiv.config.presets import Setting
from instrdiv.config.settings import Member
from instrdiv.config.sweep import Sweep
from instrdiv.evaluation.rows import result_columns
from instrdiv.runs.run import plan, run
from instrdiv.runs.saved import METRIC_COLUMNS
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.tables import read_table
from tests.worlds import TINY, tiny


def sweep(**options):
    return Sweep.grid(TINY, seeds=2, dev_tests=16, tests=24, instructions=[4, 16], **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four members, and its directory."""
    directory = tmp_path_factory.mktemp("runs") / "a" / "run"
    return run(sweep(), directory, Options(devices=2), progress=False), directory


def test_the_directory_has_the_files_of_the_contract(finished):
    names = {path.name for path in finished[1].iterdir()}
    tables = {f"{name}.csv" for name in ("metrics", "results", "timings", "resemblance", "errors", "samples")}
    assert names == tables | {"config.json", "provenance.json", "checkpoints", "tensorboard", ".lock"}


def test_results_have_a_row_a_member_a_slice(finished):
    rows = read_table(finished[1] / "results.csv")
    assert tuple(rows[0]) == result_columns(Setting)
    assert result_columns(Setting)[:11] == (
        *("figure", "group", "member", "seed", "step", "examples_seen", "split", "slice"),
        *("exact_match", "tests", "status"),
    )
    keys = [(row["member"], row["split"], row["slice"]) for row in rows]
    assert len(set(keys)) == len(keys) and len({key[0] for key in keys}) == 4
    assert {row["split"] for row in rows} == {"seen", "unseen_dev", "unseen"}
    has_op = {row["split"]: row["tests"] for row in rows if row["slice"] == "has_op"}
    assert has_op == {"seen": 24, "unseen_dev": 16, "unseen": 24}
    for row in rows:
        assert row["exact_match_low"] <= row["exact_match"] <= row["exact_match_high"]
        assert row["examples_seen"] == row["step"] * TINY.batch_size == 128
        assert row["examples_per_rule"] == 64 / row["instructions"]


def test_metrics_have_a_row_a_member_a_report(finished):
    rows = read_table(finished[1] / "metrics.csv")
    assert tuple(rows[0]) == METRIC_COLUMNS
    assert len(rows) == 4 * TINY.chunks == len({(row["member"], row["step"]) for row in rows})


def test_resemblance_is_nil_under_the_default_split(finished):
    rows = read_table(finished[1] / "resemblance.csv")
    assert len(rows) == 4 and all(row["pattern_seen"] == row["replacement_seen"] == 0 for row in rows)


def test_config_says_all_that_is_needed_to_run_again(finished):
    config = json.loads((finished[1] / "config.json").read_text())
    (cohort,) = config["cohorts"]
    assert (cohort["devices"], cohort["members_per_vmap"], cohort["data_parallel"]) == (2, 1, 1)
    for member, kept in zip(sweep().members, cohort["members"], strict=True):
        assert kept["id"] == member.id and kept["seed"] == member.seed
        assert {k: kept[k] for k in ("instructions", "width")} == {
            k: member.setting.as_row()[k] for k in ("instructions", "width")
        }


def test_the_same_run_again_is_byte_equal(finished, tmp_path):
    run(sweep(), tmp_path / "again", Options(devices=2), progress=False)
    for name in ("metrics.csv", "results.csv", "config.json", "resemblance.csv"):
        assert (tmp_path / "again" / name).read_bytes() == (finished[1] / name).read_bytes()


def test_a_finished_run_is_read_back_not_repeated(finished):
    before = {path.name: path.stat().st_mtime_ns for path in finished[1].iterdir()}
    again = run(sweep(), finished[1], Options(devices=2), progress=False)
    assert before == {path.name: path.stat().st_mtime_ns for path in finished[1].iterdir()}
    assert [row["exact_match"] for row in again.results] == [row["exact_match"] for row in finished[0].results]


def test_another_run_in_the_same_directory_is_refused_by_its_differences(finished):
    other = Sweep.grid(tiny(width=32, epochs=3.0), seeds=2, dev_tests=16, tests=24, instructions=[4, 16])
    with pytest.raises(BadInput, match=r"a different run \(width: 16 saved, 32 requested; epochs: ") as refusal:
        run(other, finished[1], Options(devices=2), progress=False)
    assert "members_per_vmap" not in str(refusal.value)
    with pytest.raises(BadInput, match=r"a different run \(instructions: 4,16 saved, 4 requested\);"):
        run(dataclasses.replace(sweep(), members=sweep().members[:2]), finished[1], Options(devices=2), progress=False)


def test_a_directory_with_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(BadInput, match="holds no run"):
        run(sweep(), tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_damaged_config_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadInput, match=r"cannot be read.*--overwrite"):
        run(sweep(), tmp_path, progress=False)


def test_a_family_too_small_leaves_nothing_behind(tmp_path):
    small = tiny(family="repeated", k_min=2, k_max=2, instructions=64)
    with pytest.raises(
        BadInput, match=r"500 held-out rules|\d+ held-out rules were requested, but the family has only"
    ):
        run(Sweep((), (Member(small, 0),), 16, 500), tmp_path / "new" / "run", progress=False)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, why",
    [
        (Options(devices=9), "--devices=9: this machine has 8"),
        (Options(devices=2, data_parallel=3), "--data_parallel=3: must divide --devices=2"),
        (Options(data_parallel=9), "--data_parallel=9: must divide the 8 devices of this machine"),
        (Options(data_parallel=0), "--data_parallel=0: must be at least 1"),
        (Options(members_per_vmap=0), "--members_per_vmap=0: must be at least 1"),
        (Options(attention="flash"), "--attention=flash: must be one of plain, cudnn"),
        (Options(attention="cudnn"), "--attention=cudnn: needs an NVIDIA GPU; the backend is cpu"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(options, why):
    with pytest.raises(BadInput, match=why):
        plan(sweep(), options)


@pytest.mark.parametrize(
    "change, why",
    [
        ({}, "--attention=cudnn: needs --config.precision=bfloat16"),
        ({"precision": "bfloat16", "input_length_min": 4}, "--attention=cudnn: needs prompts of one fixed length"),
        ({"precision": "bfloat16", "width": 24, "heads": 6}, "--attention=cudnn: needs a head size of 8, 16, … or 128"),
        ({"precision": "bfloat16"}, None),
    ],
)
def test_what_one_kernel_for_attention_cannot_do_is_refused_on_a_gpu_too(change, why, monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    options, population = Options(attention="cudnn", members_per_vmap=1), [Member(tiny(**change), 0)]
    if why is None:
        assert options.resolve(population).attention == "cudnn"
        return
    with pytest.raises(BadInput, match=why):
        options.resolve(population)


def test_a_layout_that_was_left_open_is_kept(finished, tmp_path):
    """The choice of the first launch stands, whatever this machine would choose; a finished run needs no layout."""
    assert run(sweep(), finished[1], progress=False).results
    with pytest.raises(BadInput, match=r"a different run \(devices: "):
        run(sweep(), finished[1], Options(devices=1), progress=False)
    shutil.copy(finished[1] / "config.json", tmp_path)  # an unfinished run
    run(sweep(), tmp_path, progress=False)
    assert (tmp_path / "config.json").read_bytes() == (finished[1] / "config.json").read_bytes()
    assert (tmp_path / "results.csv").read_bytes() == (finished[1] / "results.csv").read_bytes()


def test_a_field_that_an_older_run_lacks_had_its_default(finished, tmp_path):
    config = json.loads((finished[1] / "config.json").read_text())
    for member in config["cohorts"][0]["members"]:
        del member["near_miss_fraction"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("results.csv", "metrics.csv", "timings.csv", "provenance.json"):
        (tmp_path / name).write_bytes((finished[1] / name).read_bytes())
    assert run(sweep(), tmp_path, progress=False, keep_params=False).results


def test_overwrite_starts_from_scratch(finished, tmp_path):
    shutil.copytree(finished[1], tmp_path / "run")
    other = Sweep.grid(tiny(epochs=1.0), seeds=1, dev_tests=16, tests=24, instructions=[4])
    run(other, tmp_path / "run", progress=False, overwrite=True, keep_params=False)
    assert len({row["member"] for row in read_table(tmp_path / "run" / "results.csv")}) == 1


def test_a_directory_whose_name_is_too_long_is_one_line(tmp_path):
    with pytest.raises(BadInput, match="--run_dir="):
        run(sweep(), tmp_path / ("x" * 300), progress=False)
    with pytest.raises(BadInput, match="--run_dir="):
        run(sweep(), tmp_path / "new" / ("x" * 300), progress=False)
    assert not list(tmp_path.iterdir())


def test_every_name_is_read_back_as_text(finished):
    assert all(isinstance(row["member"], str) and isinstance(row["group"], str)
               for name in ("results", "metrics") for row in read_table(finished[1] / f"{name}.csv"))  # fmt: skip


@pytest.mark.parametrize("seed", [-1, 2**31])
def test_a_seed_that_no_key_can_have_is_refused(seed):
    with pytest.raises(BadInput, match="seeds must be"):
        Sweep("x", (Member(TINY, seed),)).validate()


def test_a_value_named_twice_is_refused():
    with pytest.raises(BadInput, match="twice"):
        Sweep.grid(TINY, instructions=[4, 4]).validate()


class TestPlan:
    def test_counts_members_parameters_and_memory(self):
        (group,) = plan(sweep(), Options(devices=4)).groups
        params = run_params(sweep().members[0])
        assert group.members == 4 and group.idle == 0 and group.parameters == params
        # AdamW keeps two moments; two counters and a flag besides.
        assert group.state_bytes == pytest.approx(4 * 3 * 4 * params, rel=0.01)

    @pytest.mark.optimized
    def test_flops_agree_with_xla(self):
        """Our count against XLA's, of one laptop step; XLA also counts norms, softmax and the optimizer."""
        from instrdiv.config.presets import LAPTOP
        from instrdiv.runs.planning import flops_per_example
        from tests.worlds import trainer

        setting = dataclasses.replace(LAPTOP, optimizer="adamw", epochs=64 / 16_384, reports=1, warmup_steps=0)
        t = trainer([Member(setting, 0)])
        cost = t.train_chunk.lower(*t.chunk_arguments()).compile().cost_analysis()
        assert cost["flops"] == pytest.approx(flops_per_example(t.group) * 64, rel=0.2)

    def test_a_sweep_of_200_members_plans_quickly(self):
        import time

        big = Sweep.grid(instrdiv.presets.PAPER, seeds=4, instructions=range(10, 510, 10))
        started = time.monotonic()
        text = plan(big).text
        assert time.monotonic() - started < 5 and "200 members" in text


def run_params(member):
    from tests.worlds import trainer

    return sum(leaf[0].size for leaf in jax.tree.leaves(trainer([member]).state.params))


def test_from_a_notebook_in_under_ten_lines():
    sweep = instrdiv.Sweep.grid(TINY, seeds=1, dev_tests=8, tests=8, instructions=[4, 8])
    result = instrdiv.run(sweep, progress=False)
    text = result.threshold().text
    figure = result.plot()
    assert "threshold" in text and figure.axes
    assert set(result.params) == {member.id for member in sweep.members}
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(result.params))


@pytest.mark.thorough
@pytest.mark.parametrize("batch_size", [8, pytest.param(512, marks=pytest.mark.slow)])
def test_the_paper_preset_runs_three_steps_at_full_shape(batch_size):
    """Papers' model, strings and rule table of a million; one member, and by default a small batch: this is a CPU."""
    from instrdiv.config.presets import PAPER
    from tests.worlds import trainer

    budget = {"batch_size": batch_size, "epochs": 3 * batch_size / 10**6, "reports": 1, "warmup_steps": 0}
    setting = dataclasses.replace(PAPER, instructions=10**6, **budget)
    t = trainer([Member(setting, 0)])
    metrics = t.advance()
    assert t.step == 3 and t.group.shape.sequence == 144
    assert np.isfinite(metrics.loss).all() and metrics.loss[0] < 5


def test_a_chunk_has_its_own_seconds_where_dispatch_waits_for_it(monkeypatch):
    """As on CPU: a chunk may run while it is dispatched. A fake clock advances by 10 with each."""
    from instrdiv.training.members import Trainer

    now, advance = [0.0], Trainer.advance

    def slow_dispatch(trainer):
        now[0] += 10
        return jax.block_until_ready(advance(trainer))

    monkeypatch.setattr(Trainer, "advance", slow_dispatch)
    monkeypatch.setattr(
        sys.modules["instrdiv.training.chunks"], "time", types.SimpleNamespace(monotonic=lambda: now[0])
    )
    done = run(Sweep.grid(TINY, seeds=1, dev_tests=8, tests=8, instructions=[4]), progress=False, keep_params=False)
    assert [row["seconds"] for row in done.timings] == [10.0] * TINY.chunks
    assert [row["elapsed_seconds"] for row in done.timings] == [10.0 * (i + 1) for i in range(TINY.chunks)]
