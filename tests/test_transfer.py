from __future__ import annotations

import json
from datetime import date
from typing import TYPE_CHECKING, Any

import pytest
from examples.transfer.plan import Plan, Sizes, Training
from examples.transfer.report import mean_and_half
from examples.transfer.skills import SKILLS, items
from examples.transfer.stages import Stage, Workshop
from examples.transfer.words import pools

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

ONE_STEP = Training(1, 1, 1e-5)
SIZES = Sizes((1, 2), ("record", "sort"), "sort", ONE_STEP, ONE_STEP, ONE_STEP, ONE_STEP, 4, 1, (0.5,), (1.0, 0.5))


class InterruptedWorkError(Exception):
    pass


def works(directory: Path, done: list[str], fails_at: str = "") -> Workshop:
    def work(settings: Mapping[str, Any], inputs: Mapping[str, Path], place: Path) -> None:
        name = settings["name"]
        assert all((path / "file").exists() for path in inputs.values())
        (place / "file").write_text(name)
        if name == fails_at:
            raise InterruptedWorkError
        done.append(name)

    return Workshop(directory, {"work": work})


def stage(name: str, **inputs: Stage) -> Stage:
    return Stage(name, "work", {"name": name}, inputs)


def carry_out(workshop: Workshop, wanted: Stage) -> None:
    for each in workshop.todo(wanted):
        workshop.do(each)


@pytest.mark.parametrize("skill", SKILLS)
def test_what_is_asked_was_never_trained_on(skill: str) -> None:
    trained = {item.prompt for seed in (1, 2, 3) for item in items(skill, 200, seed, held_out=False)}
    asked = {item.prompt for item in items(skill, 200, 0, held_out=True)}
    assert len(asked) == 200
    assert not trained & asked


def test_the_halves_have_no_word_in_common() -> None:
    trained, asked = pools(held_out=False), pools(held_out=True)
    for name in ("first_names", "last_names", "cities", "rooms", "adjectives", "nouns"):
        one, other = set(getattr(trained, name)), set(getattr(asked, name))
        assert one
        assert other
        assert not one & other


def test_the_same_seed_gives_the_same_items_and_another_others() -> None:
    assert items("tool", 20, 1, held_out=False) == items("tool", 20, 1, held_out=False)
    assert items("tool", 20, 1, held_out=False) != items("tool", 20, 2, held_out=False)


def test_answers_are_right() -> None:
    for item in items("chain", 50, 0, held_out=True):
        for step in item.answer.split("; "):
            left, _, right = step.partition("=")
            numbers = [int(each) for each in left.replace("-", "+-").split("+")]
            assert sum(numbers) == int(right)
    for item in items("days", 50, 0, held_out=True):
        _, count, _, _, start = item.prompt.split()
        assert (date.fromisoformat(item.answer) - date.fromisoformat(start)).days == int(count)
    for item in items("sort", 50, 0, held_out=True):
        assert item.answer.split(" < ") == sorted(item.prompt.removeprefix("Sort: ").split(", "))
    for item in items("record", 50, 0, held_out=True):
        assert all(str(value) in item.prompt for value in json.loads(item.answer).values())


def test_stages_are_done_once_and_in_order(tmp_path: Path) -> None:
    done: list[str] = []
    first = stage("first")
    last = stage("last", one=first, other=stage("second", one=first))
    for _ in range(2):
        carry_out(works(tmp_path, done), last)
    assert done == ["first", "second", "last"]


def test_a_stage_that_was_interrupted_is_done_again(tmp_path: Path) -> None:
    done: list[str] = []
    last = stage("last", one=stage("first"))
    with pytest.raises(InterruptedWorkError):
        carry_out(works(tmp_path, done, fails_at="last"), last)
    assert not works(tmp_path, done).is_done(last)
    carry_out(works(tmp_path, done), last)
    assert done == ["first", "last"]
    assert len(list(tmp_path.iterdir())) == 2


def test_other_settings_or_inputs_make_other_stages() -> None:
    assert stage("a").key != stage("b").key
    assert stage("a", one=stage("b")).key != stage("a", one=stage("c")).key
    assert stage("a", one=stage("b")).key == stage("a", one=stage("b")).key


def test_what_nobody_will_read_is_removed_and_nothing_else(tmp_path: Path) -> None:
    done: list[str] = []
    first, other = stage("first"), stage("other")
    wanted = [stage("one", start=first), stage("two", start=first)]
    (tmp_path / "mine").mkdir()
    workshop = works(tmp_path, done)
    for each in (other, wanted[0]):
        carry_out(workshop, each)
    workshop.tidy(wanted)
    assert workshop.is_done(first)
    assert not workshop.is_done(other)
    carry_out(workshop, wanted[1])
    workshop.tidy(wanted)
    assert not workshop.is_done(first)
    assert all(map(workshop.is_done, wanted))
    assert (tmp_path / "mine").is_dir()


def test_each_line_of_the_results_has_a_stage_of_its_own() -> None:
    entries = Plan(SIZES, "text").entries()
    lines = {(entry.scenario, entry.role, entry.seed, *entry.about.values()) for entry in entries}
    assert len(lines) == len(entries)
    scored = [entry.stage.key for entry in entries if entry.role != "base"]
    assert len(set(scored)) == len(scored)


def test_direct_training_differs_from_post_training_in_its_start_alone() -> None:
    plan = Plan(SIZES, "text")
    post, direct = plan.post(plan.base(), "all", 1), plan.post(plan.new_small(1), "all", 1)
    assert post.settings == direct.settings
    assert post.key != direct.key


def test_an_interval_needs_more_than_one_value() -> None:
    assert mean_and_half([1.0]) == (1.0, None)
    middle, half = mean_and_half([1.0, 2.0, 3.0])
    assert middle == 2.0
    assert half == pytest.approx(4.302653 / 3**0.5)
