"""The decoder trained from scratch, and the Llama family: weights, adapters, and generation."""
