from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
from bench import readme

from paramdelta.cli.app import commands
from paramdelta.cli.steps import steps_of
from paramdelta.errors import RecipeError
from paramdelta.planning.recipe_file import parse_recipes

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_cli_reference_is_what_the_commands_say() -> None:
    specification = importlib.util.spec_from_file_location("generate_cli", ROOT / "docs" / "generate_cli.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == module.render(), "run `make docs`"


@pytest.mark.parametrize("name", sorted(commands.commands))
def test_every_command_is_in_the_readme(name: str) -> None:
    assert f"paramdelta {name}" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


BLOCKS = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_recipes_that_are_shown_parse_and_mergekits_are_told_for_what_they_are(block: str) -> None:
    if block.startswith("# mergekit"):
        with pytest.raises(RecipeError, match="From mergekit"):
            parse_recipes(block, Path("/models/r.yaml"))
    else:
        assert steps_of(parse_recipes(block, Path("/models/r.yaml")), None)


def test_the_readmes_figures_are_those_of_the_last_benchmark() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    results = json.loads((ROOT / "bench" / "results.json").read_text(encoding="utf-8"))
    assert readme.updated(text, results) == text, "run `python -m bench.readme`"
