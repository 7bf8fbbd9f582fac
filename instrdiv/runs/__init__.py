"""A whole run: planned, trained, tested, saved, resumed, evaluated, exported."""
