"""Rewards: plain functions (completion, sample) -> float, or None for "cannot be scored"; how they
are combined and run."""
