"""What the numbers that a run adds up mean, how they are shown, and how merges score."""
