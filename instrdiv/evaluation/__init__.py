"""Testing trained models: splits, exact match, decoding, losses, and table rows."""
