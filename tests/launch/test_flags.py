"""Commands in one process: flags of their own, one line for a mistake, an exit status that is returned."""

import dataclasses
import sys

import pytest
from absl import flags as absl_flags

from instrdiv.launch.flags import (
    STOPPED,
    ListParser,
    NumberParser,
    changes_a_setting,
    define,
    define_setting_flags,
    define_switch,
    setting_flags,
    start,
)
from instrdiv.models.lora import Lora
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.fields import between, field
from instrdiv.runtime.interruption import Interrupted


@dataclasses.dataclass(frozen=True)
class World:
    rules: int = field(4, "how many")
    share: float = field(0.5, "of all", bound=between(0, 1))
    lengths: tuple[int, ...] = field((3,), "of strings")
    kind: str = field("free", "of strings", ("free", "repeated"))


def define_flags(values):
    define_setting_flags(values, World, ("rules",), aliases=("share", "kind"))
    define(values, NumberParser(int, low=1), "seeds", "how many", 3)
    define_switch(values, "dry_run", "say it")


def run(*argv, main=lambda values: None):
    return start(main, define_flags, "What it does.", list(argv), "command.py")


def given(*argv):
    """The status, and the fields and seeds that the command was given."""
    found = []
    status = run(*argv, main=lambda values: found.append((setting_flags(values, World), values.seeds, values.dry_run)))
    return status, *found


def test_it_runs_twice_in_one_process_with_other_flags():
    assert given("--config.rules=4,8", "--seeds=2", "--dry_run") == (0, ({"rules": (4, 8)}, 2, True))
    assert given("--config.lengths=3+5", "--config.kind=repeated") == (
        *(0, ({"lengths": (3, 5), "kind": "repeated"}, 3, False)),
    )
    assert given() == (0, ({}, 3, False))


def test_its_flags_are_its_own():
    before = set(absl_flags.FLAGS)
    assert given("--seeds=2")[0] == 0
    assert set(absl_flags.FLAGS) == before and "seeds" not in before


def test_a_short_name_means_the_same_and_both_are_refused(capsys):
    assert given("--share=0.25", "--kind=repeated") == (0, ({"share": 0.25, "kind": "repeated"}, 3, False))
    assert given("--share=0.25", "--config.share=0.25")[0] == 2
    assert capsys.readouterr().err == (
        "error: --share and --config.share: are two names for the same flag; give only one\n"
    )
    assert given("--rules=4")[0] == 2  # has none


def test_a_short_name_changes_a_setting_and_other_flags_do_not():
    found = []
    for argv in (["--kind=free"], ["--config.rules=4"], ["--seeds=2", "--dry_run"], []):
        run(*argv, main=lambda values: found.append(changes_a_setting(values)))
    assert found == [True, True, False, False]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--seeds=0"], ["--seeds=0", "at least 1"]),
        (["--share=2"], ["--share=2", "must be in [0, 1]"]),
        (["--config.share=-1"], ["--config.share=-1", "must be in [0, 1]"]),
        (["--config.kind=x"], ["config.kind=x", "free"]),
        (["--bogus=1"], ["bogus"]),
        (["--bogus", "1"], ["bogus"]),
        (["laptop"], ["unexpected argument 'laptop'"]),
    ],
)
def test_a_mistake_is_one_line_and_status_2(argv, words, capsys):
    assert run(*argv, main=lambda values: pytest.fail("it was run")) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and all(word in said for word in words), said


@pytest.mark.parametrize(
    "error, status, line",
    [
        (BadInput("--seeds=3: too many"), 2, "error: --seeds=3: too many"),
        (OSError(28, "No space left on device", "metrics.csv"), 2, "error: metrics.csv: No space left on device"),
        (Interrupted("Checkpoint saved"), STOPPED, "Checkpoint saved"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_how_it_ends_is_its_status(error, status, line, capsys):
    def main(values):
        raise error

    assert run(main=main) == status
    assert capsys.readouterr().err.strip() == line


def test_a_status_of_its_own_is_returned_and_the_command_is_what_was_asked():
    words = []
    assert run("--seeds=2", main=lambda values: words.extend(sys.argv) or 7) == 7
    assert words == ["command.py", "--seeds=2"] and sys.argv[0] != "command.py"


def test_without_flags_the_process_ends(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command.py", "--seeds=2"])
    with pytest.raises(SystemExit) as ended:
        start(lambda values: values.seeds, define_flags)
    assert ended.value.code == 2


def test_help_lists_the_flags_and_runs_nothing(capsys):
    assert run("--help", main=lambda values: pytest.fail("it was run")) == 0
    said = capsys.readouterr().out
    assert said.startswith("What it does.") and "--[no]dry_run: say it" in said
    assert (
        "--config.rules: how many; this figure compares a list of values" in said
        and "--share: same as --config.share" in said
    )
    assert "--help" not in said


def test_adapters_are_fields_like_others():
    found = []

    def define_them(values):
        define_setting_flags(values, Lora, aliases=("rank", "alpha", "targets"))

    for argv in (["--rank=2", "--targets=q_proj,v_proj"], ["--config.rank=2", "--config.targets=q_proj+v_proj"]):
        assert start(lambda values: found.append(setting_flags(values, Lora)), define_them, argv=argv) == 0
    assert found == [{"rank": 2, "targets": ("q_proj", "v_proj")}] * 2


def test_lists_of_lists():
    counts = ListParser(NumberParser(int), separators=",+")
    assert ListParser(counts).parse("1,5,1+5") == ((1,), (5,), (1, 5))
