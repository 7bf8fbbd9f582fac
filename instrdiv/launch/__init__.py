"""Commands: their flags, and the launchers of figures, for training from scratch and over a pretrained base."""
