"""Examples that are run, not only read."""
