"""Commands: their flags, and what every launcher of a figure does, from scratch and over a pretrained base."""
