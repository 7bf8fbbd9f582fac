"""Complete runs: planning, training, testing, saving, resuming, evaluating, exporting."""
