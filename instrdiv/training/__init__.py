"""Training: optimizers, example order, and trainers for populations of models and of adapters."""
