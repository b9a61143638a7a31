"""The memory of a run as torch sees it: traced without weights, or measured in the real run."""
