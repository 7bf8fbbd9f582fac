"""The decoder that is trained from scratch, and the Llama family with its weights, adapters and generation."""
