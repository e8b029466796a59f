"""Recipes as YAML: text to merges, every mistake with its file and line; and a recipe back to text.

A file is one merge, or several under ``merges``. Paths are relative to the file's own directory.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import yaml

from paramdelta.checkpoint.files import read_whole
from paramdelta.checkpoint.wording import clipped, printable
from paramdelta.errors import CheckpointError, RecipeError
from paramdelta.planning.policies import CHOICES, Policies
from paramdelta.planning.recipe import Delta, Recipe, checked_path
from paramdelta.planning.recipe_nodes import Nodes, compose, line_of
from paramdelta.planning.units import parse_dtype, parse_size
from paramdelta.storage.remote.address import is_remote

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_T = TypeVar("_T")

_MOST_BYTES: Final = 1 << 20
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
_MERGE: Final = "{new_base: N, post: P, base: B}"
_DELTA: Final = "{post: P, base: B}"

_GUIDE: Final = 'docs/recipes.md, "From mergekit", shows how it is written here.'
_MERGEKIT: Final = ("merge_method", "models", "slices", "modules")
_ELSEWHERE: Final = {
    "weight": "here it is alpha",
    "base_model": "here it is two things, the base of each delta and new_base, which gets the deltas",
    "model": "here it is post, beside the base that post was trained from",
    "parameters": "here weight is alpha, beside post and base",
    "filter": "here it is a pattern under alphas, '*self_attn*': 0.9 for filter: self_attn",
    "out_dtype": "here it is dtype",
    "tokenizer_source": "the tokenizer is post's, or follows vocab",
    "chat_template": "the chat template is post's",
}
"""What mergekit's words are here."""


@dataclass(frozen=True, slots=True)
class Job:
    """One merge of a recipe file: what, and the directory for the result if the file names one; and its line."""

    recipe: Recipe
    output: str | None
    file: str
    line: int


def read_recipes(file: str | os.PathLike[str]) -> list[Job]:
    """Return the merges that a recipe file (YAML) asks for; `merge_recipe` carries each out.

    Raises:
        RecipeError: it cannot be read or does not parse; the message names file and line.
    """
    path = Path(checked_path(file, "recipe"))
    try:
        text = read_whole(path, _MOST_BYTES).decode()
    except CheckpointError as error:
        raise RecipeError(error.message, file=error.file, remedy=_no_recipe(path) or error.remedy) from error
    except UnicodeDecodeError:
        raise RecipeError("is not UTF-8 text", file=printable(str(path))) from None
    return parse_recipes(text, path)


def _no_recipe(path: Path) -> str | None:
    """Return what to do where a recipe's path leads to none, None where that is not clear."""
    if path.is_dir():
        return f"Name the file in it: {path / 'recipe.yaml'}" if (path / "recipe.yaml").is_file() else "Name a file."
    return None if os.path.lexists(path) else "Check the spelling; docs/recipes.md shows what a recipe looks like."


def parse_recipes(text: str, path: Path) -> list[Job]:
    """Return the merges that a recipe file asks for.

    Raises:
        RecipeError: it does not parse; the message names file, line and field.
    """
    file = _File(path)
    root = compose(text, file.file)
    if root is None:
        raise RecipeError("is empty", file=file.file, remedy="docs/recipes.md shows what a recipe looks like.")
    if isinstance(root, yaml.MappingNode) and any(key.value == "merges" for key, _ in root.value):
        return file.jobs(root)
    return [file.job(root)]


class _File(Nodes):
    """Reads the merges of one file."""

    def __init__(self, path: Path) -> None:
        super().__init__(printable(str(path)), _ELSEWHERE)
        self._directory = path.parent
        self._outputs: set[str] = set()

    def refuse_mergekit(self, node: yaml.Node) -> None:
        """Raise the error that tells a configuration of mergekit for what it is."""
        keys = node.value if isinstance(node, yaml.MappingNode) else ()
        for key, _ in keys:
            if key.value in _MERGEKIT:
                self.refuse(key, f"{key.value} is mergekit's: this is not a recipe of paramdelta", _GUIDE)

    def jobs(self, root: yaml.MappingNode) -> list[Job]:
        """Return the merges of a file that has several."""
        self.refuse_mergekit(root)
        for key, _ in root.value:
            if key.value in _MERGE_FIELDS:
                self.refuse(key, f"{key.value} stands beside merges: each merge has its own settings, write it there")
        fields = self.mapping(root, "a recipe", f"merges: [{_MERGE}]", ("merges",))
        nodes = self.sequence(fields["merges"], "merges", f"[{_MERGE}]")
        for node in nodes:
            self._note_output(node)
        return [self._job(node) for node in nodes]

    def _note_output(self, node: yaml.Node) -> None:
        """Remember an output: what other merges of the file name so is a path, though it is not there yet."""
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.value == "output" and isinstance(value, yaml.ScalarNode):
                self._outputs.add(absolute(self._beside(value.value)))

    def job(self, node: yaml.Node) -> Job:
        """Return the one merge of a file."""
        self._note_output(node)
        return self._job(node)

    def _job(self, node: yaml.Node) -> Job:
        self.refuse_mergekit(node)
        fields = self.mapping(node, "a merge", _MERGE, _MERGE_FIELDS)
        if "new_base" not in fields:
            self.refuse(node, "new_base is missing")
        options = {name: read(fields[name], name) for name, read in self._readers().items() if name in fields}
        policies = {name: options.pop(name) for name in _POLICY_FIELDS if name in options}
        output = self.path(fields["output"], "output") if "output" in fields else None
        new_base = self.path(fields["new_base"], "new_base")
        recipe = Recipe(new_base, self._deltas(node, fields), policies=Policies(**policies), **options)
        return Job(recipe, output, self.file, line_of(node))

    def _readers(self) -> Mapping[str, Callable[[yaml.Node, str], Any]]:
        return {
            "dtype": self._dtype,
            "shard_size": self._size,
            **dict.fromkeys(CHOICES, self._choice),
            "include": self.texts,
            "exclude": self.texts,
            "trust_remote_code": self.flag,
        }

    def _dtype(self, node: yaml.Node, name: str) -> str:
        return self._checked(node, lambda: parse_dtype(self.text(node, name), name))

    def _size(self, node: yaml.Node, name: str) -> int:
        return self._checked(node, lambda: parse_size(self.plain(node, f"{name} must be a size"), name))

    def _choice(self, node: yaml.Node, name: str) -> str:
        return self.choice(node, name, CHOICES[name])

    def _deltas(self, node: yaml.Node, fields: Mapping[str, yaml.Node]) -> tuple[Delta, ...]:
        own = {name: fields[name] for name in _DELTA_FIELDS if name in fields}
        if "deltas" not in fields:
            return (self._delta(node, own),)
        if own:
            name, value = next(iter(own.items()))
            self.refuse(value, f"{name} stands both by itself and under deltas: write it under deltas only")
        nodes = self.sequence(fields["deltas"], "deltas", f"[{_DELTA}]")
        return tuple(self._delta(each, self.mapping(each, "each of deltas", _DELTA, _DELTA_FIELDS)) for each in nodes)

    def _delta(self, node: yaml.Node, fields: Mapping[str, yaml.Node]) -> Delta:
        for name in ("post", "base"):
            if name not in fields:
                self.refuse(node, f"{name} is missing")
        alpha = self._alpha(fields["alpha"], "alpha") if "alpha" in fields else 1.0
        alphas = self._alphas(fields["alphas"]) if "alphas" in fields else ()
        return Delta(self.path(fields["post"], "post"), self.path(fields["base"], "base"), alpha, alphas)

    def _alphas(self, node: yaml.Node) -> tuple[tuple[str, float], ...]:
        by_pattern = self.mapping(node, "alphas", "{'*self_attn*': 0.9}")
        return tuple(
            (pattern, self._alpha(value, f"alphas: {printable(clipped(pattern))}"))
            for pattern, value in by_pattern.items()
        )

    def _alpha(self, node: yaml.Node, name: str) -> float:
        number = self.number(node, name)
        if not math.isfinite(number):
            self.refuse(node, f"{name} must be a finite number, not {printable(clipped(node.value))}")
        return number

    def path(self, node: yaml.Node, name: str) -> str:
        """Return a path: one that leads nowhere from the file's directory may be a model of the Hub.

        Spelled out as such, so that where the program happens to run has no say in it.
        """
        text = self.text(node, name)
        if not text:
            self.refuse(node, f"{name}: the path is empty")
        if name != "output" and is_remote(text) and not text.startswith("hf://"):
            return text
        if name != "output" and self._is_of_the_hub(text):
            return f"hf://{text.removeprefix('hf://')}"
        return str(self._beside(text))

    def _beside(self, text: str) -> Path:
        return self._directory / os.path.expanduser(text)  # noqa: PTH111 (Path's fails where there is no such user)

    def _is_of_the_hub(self, text: str) -> bool:
        """Return whether a text names a model: not what is, or will be, there; nor what is missing from a directory.

        A revision makes it one whatever directories there are.
        """
        if text.startswith("hf://"):
            return True
        name, revised, _ = text.partition("@")
        if text.startswith((".", "/", "~")) or "\\" in text or name.count("/") != 1:
            return False
        beside = self._beside(text)
        if os.path.lexists(beside) or absolute(beside) in self._outputs:
            return False
        return bool(revised) or not beside.parent.is_dir()

    def _checked(self, node: yaml.Node, make: Callable[[], _T]) -> _T:
        """Return what ``make`` makes; put the line to what it refuses."""
        try:
            return make()
        except RecipeError as error:
            if error.file is None:
                self.refuse(node, error.message, error.remedy)
            raise


def absolute(path: str | os.PathLike[str]) -> str:
    """Return a path as it is compared with others, by its name alone: what it names may not be there yet."""
    return os.path.normcase(os.path.abspath(path))  # noqa: PTH100


def write_recipe(recipe: Recipe, directory: Path | None) -> str:
    """Return a recipe as YAML that means the same from a file in ``directory``, or from anywhere where that is None."""
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


def _shown(path: str, directory: Path | None) -> str:
    """Return a path as a file in ``directory`` names it: relative to it, or from ``~`` where that says less."""
    if not os.path.lexists(path):
        return path  # a model of the Hub
    full, home = os.path.abspath(path), os.path.expanduser("~")  # noqa: PTH100, PTH111
    if directory is None:
        return full
    try:
        relative = os.path.relpath(full, os.path.abspath(directory))  # noqa: PTH100
    except ValueError:  # another drive
        return full
    inside = full.startswith(os.path.join(home, "")) and not str(directory).startswith(os.path.join(home, ""))  # noqa: PTH118
    return os.path.join("~", os.path.relpath(full, home)) if inside else relative  # noqa: PTH118
