"""Skills that the model does not have at first: requests made by code, each with the one answer that counts.

Held-out items differ from those of the training by content: other words, names and cities, other numbers. An answer is
right if it is the expected one to the letter, so that a score needs no judgement.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import date, timedelta
from random import Random
from string import ascii_lowercase
from typing import TYPE_CHECKING

from examples.transfer.words import Pools, pools

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Item:
    """One request and its answer."""

    skill: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Skill:
    """One kind of request."""

    name: str
    says: str
    make: Callable[[Random, Pools], tuple[str, str]]


def record(random: Random, words: Pools) -> tuple[str, str]:
    """Who moved where: a sentence becomes JSON with fixed keys."""
    name = f"{random.choice(words.first_names)} {random.choice(words.last_names)}"
    city, age = random.choice(words.cities), random.randint(18, 89)
    sentence = random.choice(
        (
            f"{name} ({age}) moved to {city}.",
            f"At {age}, {name} left for {city}.",
            f"{city} is now home to {name}, {age}.",
        )
    )
    return f"Record: {sentence}", json.dumps({"who": name, "age": age, "to": city})


TOOLS = (
    ("lamp", "dim", "Set the light in the {room} to {level} percent.", "Make the {room} lamp {level} percent bright."),
    ("heat", "set", "I would like {level} degrees in the {room}.", "Warm the {room} up to {level} degrees."),
    ("blind", "move", "Close the blinds in the {room} by {level} percent.", "Lower the {room} blinds {level} percent."),
    ("alarm", "arm", "Arm the {room} alarm in {level} minutes.", "In {level} minutes switch on the {room} alarm."),
    ("radio", "vol", "Play the radio in the {room} at volume {level}.", "Turn the {room} radio to volume {level}."),
)


def tool(random: Random, words: Pools) -> tuple[str, str]:
    """Call something in a syntax that nobody has seen; the wish decides what."""
    device, verb, *wishes = random.choice(TOOLS)
    room, level = random.choice(words.rooms), random.randint(10, 99)
    return random.choice(wishes).format(room=room, level=level), f"@{device}~{verb} <{room}> #{level}!"


def titles(random: Random, words: Pools) -> tuple[str, str]:
    """Give a list another form: bullets, each word with a capital."""
    things = [f"{random.choice(words.adjectives)} {noun}" for noun in random.sample(words.nouns, 3)]
    return f"Bullets with capitals: {', '.join(things)}", "\n".join(f"* {thing.title()}" for thing in things)


def sort(random: Random, words: Pools) -> tuple[str, str]:
    """Put words in the order of the alphabet."""
    drawn = random.sample(words.nouns, 3)
    return f"Sort: {', '.join(drawn)}", " < ".join(sorted(drawn))


def chain(random: Random, _words: Pools) -> tuple[str, str]:
    """Two operations on numbers of two digits, with what comes out between them."""
    first, second, third = (random.randint(11, 99) for _ in range(3))
    middle = first + second
    last, sign = (middle - third, "-") if random.random() < 0.5 else (middle + third, "+")
    return f"Reckon: {first} + {second} {sign} {third}", f"{first}+{second}={middle}; {middle}{sign}{third}={last}"


def days(random: Random, _words: Pools) -> tuple[str, str]:
    """Find a date some days later in the same month."""
    start = date(random.randint(1990, 2029), random.randint(1, 12), random.randint(1, 19))
    count = random.randint(2, 9)
    return f"Date {count} days after {start.isoformat()}", (start + timedelta(count)).isoformat()


def reverse(random: Random, _words: Pools) -> tuple[str, str]:
    """Letters in the other direction."""
    letters = random.choices(ascii_lowercase, k=random.randint(4, 8))
    return f"Backwards: {'-'.join(letters)}", "-".join(reversed(letters))


SKILLS = {
    skill.name: skill
    for skill in (
        Skill("record", "a sentence to JSON with fixed keys", record),
        Skill("tool", "a call in a made-up syntax, chosen by the wish", tool),
        Skill("titles", "a list to bullets, each word with a capital", titles),
        Skill("sort", "three words in the order of the alphabet; one in six is right by chance", sort),
        Skill("chain", "two sums of numbers of two digits, step by step", chain),
        Skill("days", "a date some days later in the same month", days),
        Skill("reverse", "letters in the other direction", reverse),
    )
}


def items(skill: str, count: int, seed: int, held_out: bool) -> list[Item]:
    """Return different requests of one skill, from one half of the content.

    The halves have no word in common (`words.py`). What is made of numbers or letters is divided by a digest of
    the request.
    """
    random = Random(f"{skill} {seed} {held_out}")
    words = pools(held_out)
    found: dict[str, Item] = {}
    while len(found) < count:
        prompt, answer = SKILLS[skill].make(random, words)
        if _is_held_out(prompt) == held_out:
            found[prompt] = Item(skill, prompt, answer)
    return list(found.values())


def _is_held_out(prompt: str) -> bool:
    return hashlib.sha256(prompt.encode()).digest()[0] % 4 == 0
