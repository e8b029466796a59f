"""paramdelta."""
