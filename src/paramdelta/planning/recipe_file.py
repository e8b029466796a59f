"""Recipes as YAML: text to merges, every mistake with its file and line; and a recipe back to text.

A file is one merge, or several under ``merges``. Paths are relative to the file's own directory.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import yaml

from paramdelta.checkpoint.wording import printable, quoted
from paramdelta.errors import RecipeError
from paramdelta.planning.policies import Policies
from paramdelta.planning.recipe import Delta, Recipe
from paramdelta.planning.units import parse_dtype, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

_T = TypeVar("_T")

MOST_BYTES: Final = 1 << 20
_DELTA_FIELDS: Final = ("post", "base", "alpha", "alphas")
_POLICY_FIELDS: Final = ("vocab", "on_missing", "on_mismatch", "fp8", "include", "exclude")
_MERGE_FIELDS: Final = (
    "new_base",
    "deltas",
    *_DELTA_FIELDS,
    "dtype",
    "shard_size",
    *_POLICY_FIELDS,
    "trust_remote_code",
    "output",
)


@dataclass(frozen=True, slots=True)
class Job:
    """One merge of a recipe file: what, and the directory for the result if the file names one; and its line."""

    recipe: Recipe
    output: str | None
    file: str
    line: int


def parse_recipes(text: str, path: Path) -> list[Job]:
    """Return the merges that a recipe file asks for.

    Raises:
        RecipeError: it does not parse; the message names file, line and field.
    """
    file = _File(path)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"line {line}: not YAML: {error.problem}", file=file.name) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"not YAML: {error}", file=file.name) from None
    if root is None:
        raise RecipeError("is empty", file=file.name, remedy="docs/recipes.md shows what a recipe looks like.")
    if isinstance(root, yaml.MappingNode) and any(key.value == "merges" for key, _ in root.value):
        merges = file.mapping(root, ("merges",))["merges"]
        return [file.job(node) for node in file.sequence(merges, "merges")]
    return [file.job(root)]


class _File:
    """Reads the nodes of one file: each value where it is wanted, as what it must be, or an error with its line."""

    def __init__(self, path: Path) -> None:
        self.name = printable(str(path))
        self._directory = path.parent

    def job(self, node: yaml.Node) -> Job:
        fields = self.mapping(node, _MERGE_FIELDS)
        if "new_base" not in fields:
            self.refuse(node, "new_base is missing")
        options = {name: read(fields[name], name) for name, read in self._readers().items() if name in fields}
        policies = {name: options.pop(name) for name in _POLICY_FIELDS if name in options}
        output = self.path(fields["output"], "output") if "output" in fields else None
        recipe = self._checked(
            node,
            lambda: Recipe(
                self.path(fields["new_base"], "new_base"),
                self._deltas(node, fields),
                policies=Policies(**policies),
                **options,
            ),
        )
        return Job(recipe, output, self.name, node.start_mark.line + 1)

    def _readers(self) -> Mapping[str, Callable[[yaml.Node, str], Any]]:
        return {
            "dtype": lambda node, name: self._checked(node, lambda: parse_dtype(self.text(node, name), name)),
            "shard_size": lambda node, name: self._checked(node, lambda: parse_size(self.text(node, name), name)),
            "vocab": self.text,
            "on_missing": self.text,
            "on_mismatch": self.text,
            "fp8": self.text,
            "include": self.texts,
            "exclude": self.texts,
            "trust_remote_code": self.flag,
        }

    def _deltas(self, node: yaml.Node, fields: Mapping[str, yaml.Node]) -> tuple[Delta, ...]:
        own = {name: fields[name] for name in _DELTA_FIELDS if name in fields}
        if "deltas" not in fields:
            return (self._delta(node, own),)
        if own:
            self.refuse(node, f"{next(iter(own))} stands both by itself and under deltas: write it under deltas only")
        nodes = self.sequence(fields["deltas"], "deltas")
        return tuple(self._delta(each, self.mapping(each, _DELTA_FIELDS)) for each in nodes)

    def _delta(self, node: yaml.Node, fields: Mapping[str, yaml.Node]) -> Delta:
        for name in ("post", "base"):
            if name not in fields:
                self.refuse(node, f"{name} is missing")
        alpha = self.number(fields["alpha"], "alpha") if "alpha" in fields else 1.0
        alphas = self._alphas(fields["alphas"]) if "alphas" in fields else ()
        post, base = (self.path(fields[name], name) for name in ("post", "base"))
        return self._checked(node, lambda: Delta(post, base, alpha, alphas))

    def _alphas(self, node: yaml.Node) -> tuple[tuple[str, float], ...]:
        return tuple(
            (pattern, self.number(value, f"alphas: {pattern}")) for pattern, value in self.mapping(node).items()
        )

    def mapping(self, node: yaml.Node, known: Iterable[str] | None = None) -> dict[str, yaml.Node]:
        """Return a mapping's values by key; with ``known``, no other keys are allowed."""
        if not isinstance(node, yaml.MappingNode):
            self.refuse(node, "must be keys with values")
        fields: dict[str, yaml.Node] = {}
        for key_node, value in node.value:
            key = self.text(key_node, "a key")
            if key in fields:
                self.refuse(key_node, f"{quoted(key)} is written twice")
            if known is not None and key not in known:
                near = difflib.get_close_matches(key.replace("-", "_"), list(known), 1, 0.5)
                hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
                self.refuse(key_node, f"unknown key {quoted(key)}{hint}")
            fields[key] = value
        return fields

    def sequence(self, node: yaml.Node, name: str) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            self.refuse(node, f"{name} must be a list of at least one entry")
        return list(node.value)

    def text(self, node: yaml.Node, name: str) -> str:
        if not isinstance(node, yaml.ScalarNode) or node.tag == "tag:yaml.org,2002:null":
            self.refuse(node, f"{name} must be text")
        return str(node.value)

    def texts(self, node: yaml.Node, name: str) -> tuple[str, ...]:
        if isinstance(node, yaml.ScalarNode):
            return (self.text(node, name),)
        return tuple(self.text(each, name) for each in self.sequence(node, name))

    def number(self, node: yaml.Node, name: str) -> float:
        try:
            return float(self.text(node, name))  # YAML 1.1 would read 1e-3 as text
        except ValueError:
            self.refuse(node, f"{name} must be a number, not {quoted(str(node.value))}")

    def flag(self, node: yaml.Node, name: str) -> bool:
        if self.text(node, name) not in {"true", "false"}:
            self.refuse(node, f"{name} must be true or false")
        return bool(node.value == "true")

    def path(self, node: yaml.Node, name: str) -> str:
        """Return a path: one that leads nowhere from the file's directory may be a model of the Hub.

        Spelled out as such, so that where the program happens to run has no say in it.
        """
        text = self.text(node, name)
        if not text:
            self.refuse(node, f"{name}: the path is empty")
        beside = self._directory / Path(text).expanduser()
        if name == "output" or not _is_hub_name(text) or os.path.lexists(beside):
            return str(beside)
        return f"hf://{text.removeprefix('hf://')}"

    def refuse(self, node: yaml.Node, message: str) -> NoReturn:
        raise RecipeError(f"line {node.start_mark.line + 1}: {message}", file=self.name)

    def _checked(self, node: yaml.Node, make: Callable[[], _T]) -> _T:
        """Return what ``make`` makes; put the line to what it refuses."""
        try:
            return make()
        except RecipeError as error:
            if error.file is None:
                raise RecipeError(
                    f"line {node.start_mark.line + 1}: {error.message}", file=self.name, remedy=error.remedy
                ) from None
            raise


def _is_hub_name(text: str) -> bool:
    plain = not text.startswith((".", "/", "~")) and "\\" not in text
    return text.startswith("hf://") or (plain and text.partition("@")[0].count("/") == 1)


def write_recipe(recipe: Recipe, directory: Path) -> str:
    """Return a recipe as YAML that means the same from a file in ``directory``."""
    deltas = [
        {
            "post": _shown(delta.post, directory),
            "base": _shown(delta.base, directory),
            **({"alpha": delta.alpha} if delta.alpha != 1.0 else {}),
            **({"alphas": dict(delta.alphas)} if delta.alphas else {}),
        }
        for delta in recipe.deltas
    ]
    content: dict[str, Any] = {"new_base": _shown(recipe.new_base, directory), "deltas": deltas}
    defaults = Policies()
    for field in _POLICY_FIELDS:
        value = getattr(recipe.policies, field)
        if value != getattr(defaults, field):
            content[field] = list(value) if isinstance(value, tuple) else value
    if recipe.dtype is not None:
        content["dtype"] = recipe.dtype.lower()
    if recipe.shard_size is not None:
        content["shard_size"] = recipe.shard_size
    if recipe.trust_remote_code:
        content["trust_remote_code"] = True
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)
    return text


def _shown(path: str, directory: Path) -> str:
    """Return a path as a file in ``directory`` names it: relative to it, or from ``~`` where that says less."""
    if not os.path.lexists(path):
        return path  # a model of the Hub
    full, home = os.path.abspath(path), os.path.expanduser("~")  # noqa: PTH100, PTH111
    try:
        relative = os.path.relpath(full, os.path.abspath(directory))  # noqa: PTH100
    except ValueError:  # another drive
        return full
    inside = full.startswith(os.path.join(home, "")) and not str(directory).startswith(os.path.join(home, ""))  # noqa: PTH118
    return os.path.join("~", os.path.relpath(full, home)) if inside else relative  # noqa: PTH118
