from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paramdelta.planning.differences import Difference, refuse

MOST_LINES_PER_KIND = 20
PLACES = [("new base", "n"), ("post", "models/evil\x1b[2J"), ("base", "b")]


def lines(*differences: Difference) -> list[str]:
    """The lines of the message, but for those that say where the checkpoints are."""
    found = refuse(differences, PLACES).message.splitlines()
    assert found[1:4] == ["  new base: n", "  post: 'models/evil\\x1b[2J'", "  base: b"]
    return [found[0], *found[4:]]


def layers(pattern: str, count: int, values: str = "", kind: str = "missing from post") -> list[Difference]:
    return [Difference(kind, pattern.format(number), values) for number in range(count)]


def test_eighty_layers_that_differ_alike_make_one_line() -> None:
    found = lines(*layers("model.layers.{}.mlp.up_proj.weight", 80))
    assert found == [
        "the checkpoints do not fit each other: 80 tensors differ",
        "  missing from post (80):",
        "    model.layers.[0-79].mlp.up_proj.weight (80 tensors)",
    ]


def test_one_tensor_is_named_as_it_is() -> None:
    assert lines(Difference("shapes differ", "model.layers.3.w", "post [1], base [2]")) == [
        "the checkpoints do not fit each other: 1 tensor differs",
        "  shapes differ (1):",
        "    model.layers.3.w: post [1], base [2]",
    ]


def test_layers_that_do_not_follow_each_other_are_listed_as_runs() -> None:
    names = [Difference("k", f"layers.{number}.w", "") for number in (7, 0, 1, 2, 9, 10)]
    assert lines(*names)[2] == "    layers.[0-2,7,9-10].w (6 tensors)"


def test_experts_in_layers_make_one_line() -> None:
    names = [Difference("k", f"layers.{layer}.experts.{e}.w", "") for layer in range(4) for e in range(8)]
    assert lines(*names)[2] == "    layers.[0-3].experts.[0-7].w (32 tensors)"


def test_layers_that_differ_in_other_ways_make_other_lines() -> None:
    found = lines(*layers("layers.{}.w", 3, "post [1]"), *layers("layers.{}.w", 2, "post [2]"))
    assert found[2:] == ["    layers.[0-2].w (3 tensors): post [1]", "    layers.[0-1].w (2 tensors): post [2]"]


def test_every_kind_has_its_heading_and_its_count() -> None:
    found = lines(*layers("a.{}", 2, kind="missing from post"), *layers("b.{}", 1_500, kind="shapes differ"))
    assert found == [
        "the checkpoints do not fit each other: 1,502 tensors differ",
        "  missing from post (2):",
        "    a.[0-1] (2 tensors)",
        "  shapes differ (1,500):",
        "    b.[0-1499] (1,500 tensors)",
    ]


@pytest.mark.parametrize(("count", "shown"), [(20, 20), (21, 21), (500, 21)])
def test_no_kind_has_more_than_so_many_lines(count: int, shown: int) -> None:
    # Letters, since numbers would be joined.
    names = [f"t{chr(0x4E00 + number)}" for number in range(count)]
    found = lines(
        *(Difference("missing from post", name, "") for name in names),
        *(Difference("shapes differ", name, "post [1]") for name in names),
    )
    assert len(found) == 1 + 2 * (1 + shown)
    if count > MOST_LINES_PER_KIND:
        assert found[1 + shown] == f"    and {count - MOST_LINES_PER_KIND:,} more lines like these"


def test_the_error_names_a_tensor_and_a_remedy() -> None:
    error = refuse(layers("layers.{}.w", 3), PLACES)
    assert error.tensor == "layers.0.w"
    assert error.exit_code == 4
    assert "same architecture" in str(error)


@pytest.mark.parametrize("name", ["a{}b", "{}", "{0}.w", "a{}b.3", "{", "}", "{}{}7{}"])
def test_braces_in_names_are_letters_like_others(name: str) -> None:
    assert name in refuse([Difference("k", name, "")], PLACES).message


@pytest.mark.parametrize("name", ["layer.007.w", "٣.w", "w.³", "00", "block_01"])
def test_a_name_with_unusual_numbers_is_shown_as_it_is(name: str) -> None:
    assert lines(Difference("k", name, ""))[2] == f"    {name}"


def test_a_name_with_a_number_of_any_length_is_shown() -> None:
    found = refuse([Difference("k", "w." + "9" * 5_000, "")], PLACES)
    assert "w.999" in found.message


@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=40, unique=True))
def test_whatever_the_names_are_there_is_a_message(names: list[str]) -> None:
    found = refuse([Difference("missing from post", name, "") for name in names], PLACES)
    assert f"{len(names)} tensor" in found.message


@pytest.mark.parametrize("character", ["\x1b", "\x00", "\r", "\n", "\x7f", "\x9b", "\u202e", "\u2028"])
def test_control_characters_in_names_never_reach_the_terminal(character: str) -> None:
    found = refuse(
        [
            Difference("missing from post", f"evil{character}[2Jname.3", ""),
            Difference("missing from post", f"evil{character}[2Jname.4", ""),
            Difference("shapes differ", f"evil{character}[2Jother", "post [1], base [2]"),
        ],
        PLACES,
    )
    assert len(str(found).splitlines()) == 1 + 3 + 2 * 2 + 1
    assert all(line.isprintable() for line in str(found).splitlines())


def test_a_message_of_absurd_names_stays_readable() -> None:
    found = refuse([Difference("missing from post", chr(0x4E00 + n) * 100_000, "") for n in range(30)], PLACES)
    assert len(str(found)) < 10_000
