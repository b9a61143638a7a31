"""Memory and model states as torch sees them: traced on fake tensors, measured in a run."""
