"""One launcher per figure, plus tools; a figure's docstring gives its command, hardware, time and expected result."""
