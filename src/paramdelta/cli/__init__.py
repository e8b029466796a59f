"""The command line: a thin face of `paramdelta.api`. Nothing below this folder knows click or a terminal."""

from paramdelta.cli.app import main

__all__ = ["main"]
