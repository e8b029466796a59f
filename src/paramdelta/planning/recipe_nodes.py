"""The nodes of a recipe's YAML: each value as what it must be, or an error with file and line, and what to write."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, Final, NoReturn

import yaml

from paramdelta.checkpoint.wording import clipped, printable, quoted
from paramdelta.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_STANDARD: Final = "tag:yaml.org,2002:"
_TEXTS: Final = ("str", "timestamp")  # a directory may well be called 2025-01-31
_NUMBERS: Final = ("int", "float", "str")  # YAML 1.1 reads 1e-3 as text
_QUOTE: Final = "A pattern that begins with * must stand in quotes: '*self_attn*'."


def compose(text: str, file: str) -> yaml.Node | None:
    """Return the node that YAML text is, None where it is empty.

    Raises:
        RecipeError: it is not YAML.
    """
    try:
        root: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line if error.problem_mark else 0
        raise RecipeError(
            f"line {line + 1}: not YAML: {printable(clipped(str(error.problem)))}",
            file=file,
            remedy=_remedy(error, text, line),
        ) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"not YAML: {error}", file=file) from None
    return root


def _remedy(error: yaml.MarkedYAMLError, text: str, line: int) -> str | None:
    problem, lines = str(error.problem), text.splitlines()
    if error.context == "while scanning an alias" or "undefined alias" in problem:
        return _QUOTE
    if "another document" in problem:
        return "One file is one document. Several merges stand in a list under merges."
    shown = lines[line] if line < len(lines) else ""
    if "'\\t'" in problem or "\t" in shown[: len(shown) - len(shown.lstrip())]:
        return "YAML is indented with spaces, not with tabs."
    return None


class Nodes:
    """Reads the nodes of one file.

    Args:
        file: its name, as messages show it.
        hints: what to say of a key that is unknown here and known elsewhere.
    """

    def __init__(self, file: str, hints: Mapping[str, str]) -> None:
        self.file = file
        self._hints = hints

    def mapping(
        self, node: yaml.Node, name: str, example: str, known: Iterable[str] | None = None
    ) -> dict[str, yaml.Node]:
        """Return a mapping's values by key; with ``known``, no other keys are allowed."""
        if not isinstance(node, yaml.MappingNode):
            self.refuse(node, f"{name} must be keys with values, like {example}")
        self._refuse_tag(node, "map")
        fields: dict[str, yaml.Node] = {}
        for key_node, value in node.value:
            key = self.text(key_node, "a key")
            if key in fields:
                self.refuse(key_node, f"{quoted(key)} is written twice")
            if known is not None and key not in known:
                self.refuse(key_node, f"unknown key {quoted(key)}{self._hint(key, list(known))}")
            fields[key] = value
        return fields

    def _hint(self, key: str, known: list[str]) -> str:
        if key in self._hints and key not in known:
            return f": {self._hints[key]}"
        near = difflib.get_close_matches(key.replace("-", "_"), known, 1, 0.5)
        return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"

    def sequence(self, node: yaml.Node, name: str, example: str) -> list[yaml.Node]:
        """Return the entries of a list that has some."""
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            self.refuse(node, f"{name} must be a list of at least one entry, like {example}")
        self._refuse_tag(node, "seq")
        return list(node.value)

    def text(self, node: yaml.Node, name: str) -> str:
        """Return text; what YAML takes for a number or a truth value is none, since 010 and no mean something else."""
        if not isinstance(node, yaml.ScalarNode):
            self.refuse(node, f"{name} must be text")
        kind = self._refuse_tag(node)
        if kind == "null":
            self.refuse(node, f"{name} must be text, and is empty")
        if kind not in _TEXTS:
            self.refuse(node, f"{name} must be text: if it is, write it in quotes, {quoted(node.value)}")
        return str(node.value)

    def texts(self, node: yaml.Node, name: str) -> tuple[str, ...]:
        """Return a list of texts, or the one that stands for itself."""
        if isinstance(node, yaml.ScalarNode):
            return (self.pattern(node, name),)
        return tuple(self.pattern(each, name) for each in self.sequence(node, name, "['*self_attn*']"))

    def pattern(self, node: yaml.Node, name: str) -> str:
        """Return a pattern, which matches nothing where it is empty."""
        text = self.text(node, name)
        if not text:
            self.refuse(node, f"{name}: an empty pattern matches nothing")
        return text

    def number(self, node: yaml.Node, name: str) -> float:
        """Return a number."""
        text = self.plain(node, f"{name} must be a number", _NUMBERS)
        try:
            return float(text)
        except ValueError:
            self.refuse(node, f"{name} must be a number, not {quoted(text)}")

    def choice(self, node: yaml.Node, name: str, choices: Iterable[str]) -> str:
        """Return one of a few words."""
        wanted = f"must be one of {', '.join(choices)}"
        text = self.plain(node, f"{name} {wanted}")
        if text not in choices:
            self.refuse(node, f"{name}: {quoted(text)} {wanted}")
        return text

    def flag(self, node: yaml.Node, name: str) -> bool:
        """Return a truth value."""
        text = self.plain(node, f"{name} must be true or false", ("bool",))
        if text not in {"true", "false"}:
            self.refuse(node, f"{name} must be true or false")
        return text == "true"

    def plain(self, node: yaml.Node, message: str, kinds: Iterable[str] | None = None) -> str:
        """Return a single value as it is written, where YAML takes it for one of the kinds."""
        if not isinstance(node, yaml.ScalarNode):
            self.refuse(node, message)
        kind = self._refuse_tag(node)
        if kind == "null":
            self.refuse(node, f"{message}, and is empty")
        if kinds is not None and kind not in kinds:
            self.refuse(node, f"{message}, not {quoted(str(node.value))}")
        return str(node.value)

    def _refuse_tag(self, node: yaml.Node, wanted: str | None = None) -> str:
        """Return what kind YAML takes a node for; refuse tags that are not its own."""
        tag = str(node.tag)
        kind = tag.removeprefix(_STANDARD)
        if not tag.startswith(_STANDARD) or "/" in kind or wanted not in {None, kind}:
            shown = tag if not tag.startswith(_STANDARD) else f"!!{kind}"
            self.refuse(node, f"unknown tag {quoted(shown)}: recipes have none")
        return kind

    def refuse(self, node: yaml.Node, message: str, remedy: str | None = None) -> NoReturn:
        """Raise the error about a node."""
        raise RecipeError(f"line {line_of(node)}: {message}", file=self.file, remedy=remedy)


def line_of(node: Any) -> int:
    """Return the line on which a node begins, counted from 1."""
    return int(node.start_mark.line) + 1
