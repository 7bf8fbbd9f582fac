"""Commands see the terminal that we have, what they say is passed on and kept, and signals reach them once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from instrdiv.runtime.processes import LAST_LINES, Commands, on_screen

ROOT = Path(__file__).parents[2]

#: A launcher in miniature: the first signal lets it end with status 75, a second one at once.
PATIENT = """
import signal, sys, time
def stop(number, frame):
    signal.signal(number, signal.SIG_DFL)
    print("saving", flush=True)
    time.sleep(1)
    sys.exit(75)
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(60)
"""

#: Runs Python with the arguments it was given, and says how that ended.
RUNNER = """
import sys
from instrdiv.runtime.processes import Commands
with Commands() as running:
    ended = running.run([sys.executable, *sys.argv[1:]])
print("ended", ended.text, list(ended.last_lines), running.stop)
"""


def python(code):
    return [sys.executable, "-c", code]


def runner(*arguments, **options):
    return subprocess.Popen([*python(RUNNER), *arguments], cwd=ROOT, **options)


def test_what_is_said_is_passed_on_and_its_end_kept(capfdbinary):
    ended = Commands().run(python("import sys; print('one', flush=True); print('two', file=sys.stderr); sys.exit(3)"))
    assert (ended.status, ended.text, ended.last_lines) == (3, "exit status 3", ["one", "two"])
    assert capfdbinary.readouterr().out == b"one\ntwo\n"


def test_of_much_only_the_end_is_kept(capfdbinary):
    ended = Commands().run(python(f"for i in range({50 * LAST_LINES}): print(i, 'x' * 100)"))
    assert len(ended.last_lines) == LAST_LINES and ended.last_lines[-1].startswith(f"{50 * LAST_LINES - 1} x")
    assert ended.status == 0 and capfdbinary.readouterr().out.count(b"\n") == 50 * LAST_LINES


def test_a_command_that_a_signal_ended_says_which(capfdbinary):
    ended = Commands().run(python("import os; os.kill(os.getpid(), 9)"))
    assert (ended.status, ended.text, ended.last_lines) == (-9, "ended by SIGKILL", [])


@pytest.mark.parametrize("terminal", [True, False])
def test_a_progress_bar_sees_a_terminal_where_there_is_one(terminal):
    bar = (
        "import time; from instrdiv.runtime.progress import Reporter\n"
        "with Reporter(100) as r:\n"
        "    for i in range(4): r.report(25, None, 1, [i / 4], f'step {i}'); time.sleep(0.4)\n"
        "    r.note('a note')\n"
        "raise SystemExit(1)"
    )
    ours, theirs = os.openpty() if terminal else os.pipe()
    process = runner("-c", bar, stdout=theirs, stdin=subprocess.DEVNULL)
    os.close(theirs)
    said = b""
    try:
        while piece := os.read(ours, 4096):
            said += piece
    except OSError:  # the end of a terminal
        pass
    os.close(ours)
    assert process.wait() == 0
    shown, kept = said.decode().split("ended exit status 1 ")
    assert ("\x1b[2K" in shown) == terminal  # the bar is redrawn, or there are lines
    assert "\x1b" not in kept and "a note" in kept
    assert [kept.count(f"step {i}:") for i in range(4)] == ([0, 0, 0, 1] if terminal else [1, 1, 1, 1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_command_once_and_its_end_is_waited_for(number):
    process = runner("-c", PATIENT, stdout=subprocess.PIPE, text=True, process_group=0)
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, number)  # as Ctrl-C does: to all that the terminal has in front
    said = process.stdout.read()
    assert process.wait() == 0 and said.startswith("saving\nended exit status 75 ['ready', 'saving'] "), said
    assert said.strip().endswith(str(signal.Signals(number)))


def test_a_second_signal_reaches_it_too():
    process = runner("-c", PATIENT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.stdout.readline() == "saving\n"
    process.terminate()
    assert "ended by SIGTERM" in process.stdout.read() and process.wait() == 0


def test_a_reader_that_leaves_stops_the_command_which_may_save(tmp_path):
    path = tmp_path / "saved"
    saving = f"print('x' * 10**6); open({str(path)!r}, 'w').close(); sys.exit(75)"  # more than a pipe holds
    code = PATIENT.replace("sys.exit(75)", saving).replace(
        "time.sleep(60)", "\nfor i in range(600):\n    print(i, flush=True)\n    time.sleep(0.1)"
    )
    process = runner("-c", code, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.stdout.close()
    started = time.monotonic()
    assert "BrokenPipeError" in process.stderr.read() and process.wait() != 0
    assert path.exists() and time.monotonic() - started < 30


def test_redrawn_lines_appear_once():
    frame = "━━━ {} %\r\nstep {}\r"
    drawn = "\x1b[?25lplan\r\n" + "\r\x1b[2K\x1b[1A\x1b[2K".join(frame.format(i, i) for i in range(5)) + "\r\n"
    assert on_screen(drawn + "\x1b[31merror\x1b[0m\n") == ["plan", "━━━ 4 %", "step 4", "error"]
    assert on_screen("") == [] and on_screen("\x1b[1A\x1b[1Aa\n\nb") == ["a", "b"]
