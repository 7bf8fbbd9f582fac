"""The clock stops at the first line that reports a step; a launcher that exits before it is an error."""

import pytest

from tools import startup


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    """A stand-in for figure 2a: prints these lines, and creates the cache directory that it was given."""

    def write(*lines):
        (tmp_path / "stand_in.py").write_text(
            "import os, pathlib, sys, time\n"
            "cache = pathlib.Path(os.environ['JAX_COMPILATION_CACHE_DIR'])\n"
            "warm = cache.exists(); cache.mkdir(exist_ok=True)\n"
            f"print(*sys.argv[1:], warm, file=open({str(tmp_path / 'log')!r}, 'a'))\n"
            + "".join(f"print({line!r}, file=sys.stderr, flush=True)\n" for line in lines)
            + "time.sleep(30)\n" * (", step " in lines[-1])
        )
        monkeypatch.setattr(startup, "ROOT", tmp_path)
        monkeypatch.setattr(startup, "LAUNCHER", "stand_in")
        return tmp_path / "log"

    return write


def test_times_a_cold_and_a_warm_start_and_ends_what_it_started(launcher):
    log = launcher("compiling", "group g0, step 1 of 32: fine")
    found = startup.measure("smoke", 32)
    assert found.keys() == {"cold", "warm"} and all(0 < seconds < 25 for seconds in found.values())
    cold, warm = (line.split() for line in log.read_text().splitlines())
    assert cold[:2] == warm[:2] == ["--preset=smoke", "--config.reports=32"]
    assert (cold[-1], warm[-1]) == ("False", "True") and cold[2] != warm[2]


def test_a_launcher_that_fails_is_an_error_that_says_so(launcher):
    launcher("error: no such thing")
    with pytest.raises(RuntimeError, match="stand_in ended before its first step: error: no such thing"):
        startup.measure("smoke", 32)
