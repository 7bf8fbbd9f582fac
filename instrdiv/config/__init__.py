"""What a run is: settings, members, sweeps, groups, presets, and its layout on the machine."""
