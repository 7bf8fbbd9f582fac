"""From text to packed rows: sources, templates, tokenizers, cleaning, mixtures, held-out rows."""
