"""Optimizers, the order of the examples, and what trains: populations of models, and of adapters."""
