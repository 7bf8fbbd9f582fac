"""Progress on a terminal and off it."""

import io

from instrdiv.runtime.progress import Reporter


def test_plain_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    with Reporter(1000, stream=stream) as reporter:
        reporter.report(100, None, 26, [0.0, 0.5, 1.0], "step 1")
        reporter.report(100, 2.0, 26, [0.0, 0.5, 1.0], "step 2")
    first, second = stream.getvalue().splitlines()
    assert "examples/s" not in first and "step 1" in first  # compilation was part of it
    assert "50 examples/s, 1,300 tokens/s" in second and "ETA 0:00:16" in second and "0.00/0.50/1.00" in second


def test_silence_on_request():
    stream = io.StringIO()
    with Reporter(1000, enabled=False, stream=stream) as reporter:
        reporter.report(100, 2.0, 26, [0.5], "step 1")
        reporter.working("testing")
    assert stream.getvalue() == ""
