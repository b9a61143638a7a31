"""Reinforcement learning: from prompts to the batches that the loop trains."""
