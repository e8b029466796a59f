"""``python -m paramdelta``."""

from paramdelta.cli import main

main()
