"""What a run's memory is, before it runs: closed forms in plain Python."""
