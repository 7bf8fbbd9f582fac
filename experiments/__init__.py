"""One launcher a figure; each header says command, hardware, time and expected result."""
