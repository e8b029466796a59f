"""The words that skills are made of, in two halves that do not meet: what is trained on, what is asked."""

from __future__ import annotations

from dataclasses import dataclass

HELD_OUT_EVERY = 3  # each third word is never trained on

FIRST_NAMES = (
    "Marta Henrik Oona Pavel Ingrid Tomas Leila Viktor Amara Jonas Petra Samir Greta Luca Nadia Oskar Elena Bruno "
    "Hanna Felix Irina Mateo Sofia Anton Carmen Erik Dalia Hugo Maren Nils Rosa Stefan Tilda Yusuf Alma Boris"
)
LAST_NAMES = (
    "Kovacs Lindqvist Moreau Novak Ferrari Jansen Petrov Okafor Schmidt Larsen Haddad Romano Dubois Costa Weber Nowak "
    "Berg Silva Fischer Horvat Keller Bianchi Lopez Andersen Popescu Meyer Rossi Dahl Marino Vogel Laine Duarte"
)
CITIES = (
    "Lyon Riga Porto Turin Bergen Krakow Seville Graz Ghent Malmo Zagreb Basel Cork Tampere Leipzig Verona Bristol "
    "Nantes Odessa Vienna Lisbon Prague Dublin Athens Geneva Hamburg Naples Oslo Warsaw Milan"
)
ROOMS = "kitchen hall bedroom office attic bathroom garage cellar library studio porch nursery pantry lounge workshop"
ADJECTIVES = (
    "red cold small bright old heavy quiet green soft narrow black warm sharp empty round dry blue thin loud clean "
    "white slow deep plain broken yellow light tall open silver"
)
NOUNS = (
    "pear river lamp amber stone window garden bottle candle ladder market needle orange pocket ribbon saddle ticket "
    "valley wagon anchor basket copper desert engine forest guitar hammer island jacket kettle lemon mirror napkin "
    "onion pencil quilt rocket shadow tunnel umbrella violin whistle yard apple bridge castle drum eagle feather glove "
    "horse insect judge king letter mountain nest ocean paper queen road sugar table uncle village winter bread cloud "
    "door field flower glass grain house iron jewel knife leaf money night oil plant ring salt tree voice wheel boat "
    "clock dust egg farm gate hill ink key lake milk nail oven pipe rope sand tower wall bell coat dish flag goat hat "
    "jar leg map net owl pan rug ship tent vase well zoo barn crow"
)


@dataclass(frozen=True)
class Pools:
    """The words of one half."""

    first_names: tuple[str, ...]
    last_names: tuple[str, ...]
    cities: tuple[str, ...]
    rooms: tuple[str, ...]
    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]


def pools(held_out: bool) -> Pools:
    """Return the half that is trained on, or the one that is asked."""
    lists = (FIRST_NAMES, LAST_NAMES, CITIES, ROOMS, ADJECTIVES, NOUNS)
    return Pools(*(_half(words.split(), held_out) for words in lists))


def _half(words: list[str], held_out: bool) -> tuple[str, ...]:
    return tuple(word for place, word in enumerate(words) if (place % HELD_OUT_EVERY == 0) == held_out)
