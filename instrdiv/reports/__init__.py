"""Pages about finished runs, made from the files in their directories alone."""
