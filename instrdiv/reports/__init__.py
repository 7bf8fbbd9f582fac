"""HTML pages about finished runs, built only from the files in their directories."""
