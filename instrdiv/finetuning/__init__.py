"""Pretrained models: Llama-family checkpoints, and populations of LoRA adapters over one frozen base."""
