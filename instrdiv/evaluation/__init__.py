"""How trained models are tested: splits, exact match, decoding, losses, and the rows of the tables."""
