"""Bytes: where they come from and where they go. Nothing here knows what a tensor is."""
