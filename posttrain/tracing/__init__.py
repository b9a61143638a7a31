"""What a run really allocates, measured."""
