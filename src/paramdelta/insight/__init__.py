"""What the numbers that runs add up mean."""
