"""One thin trainer per method: what is special about it, nothing else."""
