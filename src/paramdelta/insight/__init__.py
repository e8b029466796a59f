"""What the numbers mean: those that runs add up, and those of benchmarks."""
