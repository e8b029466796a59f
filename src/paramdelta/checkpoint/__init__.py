"""What a checkpoint is. Read-only, and reads nothing bigger than a header."""
