"""Writes cli.md from the commands themselves: ``python docs/generate_cli.py``. A test holds the two in step."""

from __future__ import annotations

from pathlib import Path

import click

from paramdelta.cli.app import commands

PAGE = Path(__file__).with_name("cli.md")


def render() -> str:
    """Return the whole page: the help of the program, then that of each command."""
    parts = ["# Command line", "Generated from `--help` by `make docs`; do not edit.", "## paramdelta", _help(commands)]
    for name, command in sorted(commands.commands.items()):
        parts += [f"## paramdelta {name}", _help(command, name)]
    return "\n\n".join(parts) + "\n"


def _help(command: click.Command, name: str | None = None) -> str:
    parent = click.Context(commands, info_name="paramdelta") if name else None
    settings = {**commands.context_settings, "terminal_width": 100}
    with click.Context(command, info_name=name or "paramdelta", parent=parent, **settings) as context:
        return f"```text\n{command.get_help(context)}\n```"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
