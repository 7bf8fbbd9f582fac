"""Run configuration: settings, members, sweeps, groups, presets, and the device layout."""
