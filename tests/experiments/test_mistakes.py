"""Every mistake that we could think of, in every command: one clear line, no traceback, and nothing left behind."""

import shutil

import pytest

from instrdiv.config.layout import Options
from instrdiv.config.sweep import Sweep
from instrdiv.runs.run import run
from instrdiv.runs.saved import SavedRun
from tests.commands import command
from tests.experiments.test_launchers import FIG2A
from tests.worlds import TINY

EVALUATE, EXPORT, SHOW = "experiments.evaluate", "experiments.export", "experiments.show_data"
FIG3, TABLE1, SCALING = "experiments.fig3_long_tail", "experiments.table1_occurrences", "experiments.threshold_scaling"
SMOKE = (FIG2A, "--preset=smoke")
MEMBER = Sweep.grid(TINY, seeds=1, instructions=[4]).members[0].id

#: command -> what the one line must name and say. {saved}: a finished run; {damaged}: one whose checkpoints are;
#: {torn}: one whose config.json is; {used}: one that another launch is writing to; {other}: something else; {file}.
MISTAKES = [
    # Flags that nobody defined, or that mean nothing.
    ((*SMOKE, "--bogus=1"), ["bogus"]),
    ((*SMOKE, "laptop"), ["unexpected argument 'laptop'"]),
    ((FIG2A, "--preset=huge"), ["--preset=huge", "smoke|laptop|gpu|paper"]),
    ((*SMOKE, "--seeds=three"), ["--seeds=three", "whole number"]),
    ((*SMOKE, "--seeds=0"), ["--seeds=0", "at least 1"]),
    ((*SMOKE, "--dry_run=maybe"), ["--dry_run=maybe: must be true or false"]),
    ((*SMOKE, "--config.biases=maybe"), ["config.biases=maybe", "true or false"]),
    ((*SMOKE, "--config.instructions=16,x"), ["config.instructions=16,x", "whole number"]),
    ((*SMOKE, "--config.norm=batchnorm"), ["config.norm=batchnorm", "layernorm"]),
    ((*SMOKE, "--config.learning_rate=nan"), ["--config.learning_rate=nan: must be a finite number"]),
    ((*SMOKE, "--config.weight_decay=inf"), ["--config.weight_decay=inf: must be a finite number"]),
    ((*SMOKE, "--checkpoint_minutes=-1"), ["--checkpoint_minutes=-1", "at least 0"]),
    ((*SMOKE, "--checkpoint_steps=0"), ["--checkpoint_steps=0", "at least 1"]),
    # Settings that cannot be.
    ((*SMOKE, "--config.instructions=16,100000"), ["--config.instructions=100000", "--config.examples"]),
    ((*SMOKE, "--config.instructions=16,16"), ["--config.instructions=16,16", "16 twice"]),
    ((*SMOKE, "--config.pattern_length=9"), ["--config.pattern_length=9", "shortest input"]),
    ((*SMOKE, "--config.occurrences=4"), ["--config.occurrences=4", "fit into"]),
    ((*SMOKE, "--config.no_op_fraction=1.2"), ["--config.no_op_fraction=1.2", "[0, 1]"]),
    ((*SMOKE, "--config.heads=5"), ["--config.heads=5", "--config.width"]),
    ((*SMOKE, "--config.epochs=1e308"), ["--config.epochs=1e+308", "2^31 steps"]),
    ((*SMOKE, "--config.held_out_share=0.0001"), ["--config.held_out_share=0.0001", "[0.001, 0.999]"]),
    ((*SMOKE, "--config.near_miss_fraction=0.5"), ["--config.near_miss_fraction=0.5: has no effect"]),
    ((*SMOKE, "--config.k_max=3"), ["--config.k_max=3: has no effect", "--config.family"]),
    ((*SMOKE, "--config.alphabet_size=2", "--config.instructions=64"), ["--config.family=free", "has only"]),
    ((FIG3, "--preset=smoke", "--config.tail_shape=inf,0"), ["--config.tail_shape=0.0: must be positive"]),
    ((TABLE1, "--preset=smoke", "--config.occurrences=1,1+x"), ["config.occurrences=1,1+x", "whole number"]),
    ((TABLE1, "--preset=smoke", "--config.occurrences=1,1+4"), ["--config.occurrences=1,4", "at most 3 patterns"]),
    ((SCALING, "--preset=smoke", "--factor=color"), ["--factor=color", "width"]),
    ((SCALING, "--preset=smoke", "--factor=depth"), ["--factor=depth: the preset smoke has width, rate"]),
    # Layouts that do not fit.
    ((*SMOKE, "--devices=100000"), ["--devices=100000", "from 1 to 256"]),
    ((*SMOKE, "--data_parallel=3"), ["--data_parallel=3", "must divide"]),
    # Directories that cannot be used.
    ((*SMOKE, "--run_dir="), ["--run_dir=: must not be empty"]),
    ((*SMOKE, "--run_dir=/proc/nowhere/run"), ["--run_dir=/proc/nowhere/run", "not writable"]),
    ((*SMOKE, "--run_dir={file}/run"), ["--run_dir=", "is a file"]),
    ((*SMOKE, "--run_dir=" + "x" * 300), ["--run_dir="]),
    ((*SMOKE, "--run_dir={other}"), ["--run_dir=", "is not empty and holds no run"]),
    ((*SMOKE, "--run_dir={saved}"), ["--run_dir=", "already contains a different run (", "width: 16 saved, 32"]),
    ((*SMOKE, "--run_dir={torn}"), ["config.json cannot be read", "--overwrite"]),
    # Looking at data.
    ((SHOW, "--preset=smoke", "--num=100000"), ["--num=100000: --split=train has 512 examples"]),
    ((SHOW, "--preset=smoke", "--split=hidden"), ["--split=hidden", "unseen_dev"]),
    ((SHOW, "--preset=smoke", "--seed=-1"), ["--seed=-1", "from 0"]),
    ((SHOW, "--preset=smoke", "--format=xml"), ["--format=xml", "jsonl"]),
    # Evaluating a checkpoint.
    ((EVALUATE, "--suite=no_op"), ["--run_dir"]),
    ((EVALUATE, "--run_dir=nowhere", "--suite=no_op"), ["--run_dir=nowhere: holds no run"]),
    ((EVALUATE, "--run_dir={saved}", "--suite=everything"), ["--suite=everything", "held_out"]),
    ((EVALUATE, "--run_dir={saved}", "--suite=no_op", "--step=7"), ["--step=7", "saved steps: 16"]),
    ((EVALUATE, "--run_dir={saved}", "--suite=no_op", "--members=m0"), ["--members=m0"]),
    ((EVALUATE, "--run_dir={saved}", "--suite=lengths"), ["--suite=lengths", "learned"]),
    ((EVALUATE, "--run_dir={saved}", "--suite=no_op", "--show=-1"), ["--show=-1"]),
    ((EVALUATE, "--run_dir={damaged}", "--suite=no_op"), ["16: the checkpoint is damaged"]),
    ((EVALUATE, "--run_dir={used}", "--suite=no_op"), ["is in use by process"]),
    # Exporting a member.
    ((EXPORT, "--run_dir={saved}", "--out=new"), ["--member: must be given"]),
    ((EXPORT, "--run_dir={saved}", "--member=m0", "--out=new"), ["--member=m0", "no such member"]),
    ((EXPORT, "--run_dir={saved}", f"--member={MEMBER}", "--step=3", "--out=new"), ["--step=3", "saved steps: 16"]),
    ((EXPORT, "--run_dir={saved}", f"--member={MEMBER}", "--out={other}"), ["--out=", "is not empty"]),
    ((EXPORT, "--run_dir={damaged}", f"--member={MEMBER}", "--out=new"), ["16: the checkpoint is damaged"]),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """What the mistakes are about; each test leaves it as it was."""
    path = tmp_path_factory.mktemp("places")
    sweep = Sweep.grid(TINY, seeds=1, dev_tests=16, tests=24, instructions=[4])
    run(sweep, path / "saved", Options(devices=1), progress=False, keep_params=False)
    for name in ("damaged", "torn", "used"):
        shutil.copytree(path / "saved", path / name)
    shutil.rmtree(path / "damaged" / "checkpoints" / "g0" / "16" / "state")
    (path / "torn" / "config.json").write_text("{")
    (path / "other").mkdir()
    (path / "other" / "thesis.tex").write_text("precious")
    (path / "file").write_text("")
    (path / "here").mkdir()
    with SavedRun(path / "used").locked():
        yield path


def everything(path):
    return {p: p.read_bytes() if p.is_file() else None for p in path.rglob("*") if p.name != ".lock"}


@pytest.mark.parametrize("arguments, parts", MISTAKES, ids=lambda value: " ".join(value)[12:70])
def test_a_mistake_is_one_clear_line_and_leaves_nothing(arguments, parts, places):
    names = {name: places / name for name in ("saved", "damaged", "torn", "used", "other", "file")}
    module, *flags = (argument.format(**names) for argument in arguments)
    if module in (FIG2A, FIG3, TABLE1, SCALING) and not any(flag.startswith("--run_dir") for flag in flags):
        flags.append("--run_dir=run")
    before = everything(places)
    done = command(module, *flags, cwd=places / "here")
    lines = [line for line in done.stderr.splitlines() if line]
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert all(part in lines[0] for part in parts), lines[0]
    assert everything(places) == before


def test_there_are_forty():
    assert len(MISTAKES) >= 40 and len({arguments[0] for arguments, _ in MISTAKES}) == 7
