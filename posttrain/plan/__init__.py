"""A run's memory before it runs: exact states, a trace of its step, a factor for allocators."""
