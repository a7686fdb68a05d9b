"""Draws names and values for the generated tasks; each list is cut into a training and a held-out part.

Every word of the first four lists is one token of the shipped model's tokenizer (with the space before it).
"""

from __future__ import annotations

import random

from flux_attention.tasks.text import belongs

ADJECTIVES = """
amber ancient arctic bitter blazing bold brass brave bright bronze calm carved clever coral cosmic crimson crystal
curious dapper dusty eager early elder emerald fabled faded fierce fluffy foggy frozen gentle gilded golden grand
hidden hollow humble icy indigo ivory jolly lively lonely lunar marble mellow misty modest noble odd opal patient
polar proud purple quick quiet rapid rusty salty scarlet shy silent silver sleepy smooth solar spicy stern stormy
sturdy sunny swift tame tiny velvet vivid wandering warm wild wise witty wooden young zesty
""".split()

NOUNS = """
anchor anvil apple arrow badger banjo barn basket beacon bear beetle bell bison bottle bridge broom bucket candle
canoe castle cello chapel clock comet compass copper crane crow dolphin dragon drum eagle falcon feather ferry
fiddle forest fountain fox garden goose hammer harbor harp hawk heron island jaguar kettle kite ladder lantern lemon
lion lizard lobster magnet mantle maple meadow mirror monkey moose needle oak orchid otter owl panda parrot pearl
pelican pepper piano pigeon pillow planet puffin quill rabbit raven ribbon river rocket salmon scarf shark shovel
sparrow spider squirrel statue swan teapot temple tiger tower tractor trumpet tulip turtle violin wagon walnut whale
willow wolf zebra
""".split()

PEOPLE = """
Ada Agnes Alba Alma Amir Anders Anita Anton Arlo Astrid Aziz Beatrix Bela Bianca Boris Bruno Camila Carlos Cecil
Clara Cosima Cyrus Dalia Dario Delia Diego Dora Edgar Edith Elena Elias Elsa Emil Enzo Esther Fabian Farah Felix
Fiona Flora Frida Gerda Gideon Greta Gustav Hanna Harald Hazel Hector Hilda Hugo Ibrahim Ida Igor Ines Irma Isaac
Ivan Ivy Jakob Jasmin Jonas Judith Julio Karim Katja Kenji Klara Kofi Lars Laura Lena Leon Lidia Linus Lola Lucia
Ludwig Luisa Magda Malik Marco Margo Marta Mateo Maya Milan Mina Mira Nadia Nikolai Nina Noemi Nora Olga Omar Oscar
Otto Pablo Paula Pedro Petra Quentin Rafael Ramona Rashid Renata Rico Rita Roland Rosa Rufus Sabina Salma Samir
Selma Silas Sofia Stefan Sven Tamar Tariq Thea Tobias Ulrich Umberto Uma Ursula Valeria Vera Victor Viola Walter
Wanda Xenia Yara Yosef Yusuf Zelda Zoran
""".split()

CITIES = """
Accra Adelaide Ankara Antwerp Athens Baku Bergen Bern Bogota Boston Brussels Cairo Calgary Cardiff Chicago Cork
Dakar Delhi Denver Dublin Durban Geneva Genoa Ghent Glasgow Graz Hamburg Hanoi Havana Helsinki Istanbul Jakarta
Kyoto Lagos Lima Lisbon London Lyon Madrid Malmo Manila Melbourne Miami Milano Montreal Moscow Mumbai Munich Nairobi
Naples Odessa Osaka Oslo Ottawa Oxford Paris Perth Porto Prague Quito Reno Riga Rome Seattle Seoul Seville Sofija
Stockholm Sydney Tallinn Tampa Tokyo Toronto Tunis Turin Utrecht Venice Vienna Vilnius Warsaw York Zagreb Zurich
""".split()


GOODS = """
apples bags balloons blankets books bottles bowls bricks brushes buttons cakes candles cards carrots chairs coins
cookies crayons cups curtains dolls eggs envelopes erasers flags flowers forks gloves grapes hats jars keys lamps leaves
lemons magnets marbles mugs mushrooms nails notebooks onions oranges paintings pancakes pears pencils pillows plants
plates posters potatoes ribbons rings ropes sandwiches scarves seeds shells shirts shoes socks spoons stamps stickers
stones stools tickets tiles tomatoes towels toys umbrellas vases
""".split()


def split_words(words: list[str], split: bool | str, fraction: float = 0.25) -> list[str]:
    """Return the part of ``words`` that belongs to a split, as ``text.belongs`` takes it."""
    return [word for word in words if belongs(word, split, fraction)]


class Words:
    """
    Draws names and values without repetition, from the training or the held-out vocabulary.

    Held-out names are never keys or asked values in training. They do occur there in copied passages, as a token
    that was never read has no meaning to look up.

    Parameters
    ----------
    rng : random.Random
        Source of randomness.
    held_out : bool or str
        Which part of every word list, and which five-digit codes, to draw from: the held-out one or the others, or one
        of ``text.SPLITS``.

    Raises
    ------
    IndexError
        When a list is used up; the sample is then as dense as the vocabulary allows.
    """

    def __init__(self, rng: random.Random, held_out: bool | str = False):
        self.rng, self.held_out = rng, held_out
        self.pools = {
            name: rng.sample(words, len(words))
            for name, words in (
                ("person", split_words(PEOPLE, held_out)),
                ("city", split_words(CITIES, held_out)),
            )
        }
        self.adjectives, self.nouns = split_words(ADJECTIVES, held_out), split_words(NOUNS, held_out)
        self.taken: set[str] = set()

    def draw(self, kind: str) -> str:
        """Draw a person or a city that was not drawn yet."""
        return self.pools[kind].pop()

    def key(self) -> str:
        """Draw an adjective and a noun that were not drawn together yet."""
        if len(self.taken) == len(self.adjectives) * len(self.nouns):
            raise IndexError("all keys are drawn")
        while True:
            key = f"{self.rng.choice(self.adjectives)} {self.rng.choice(self.nouns)}"
            if key not in self.taken:
                self.taken.add(key)
                return key

    def code(self) -> str:
        """Draw a code of five digits."""
        while True:
            code = f"{self.rng.randrange(100_000):05d}"
            if belongs(code, self.held_out, 0.2):
                return code

    def distinct(self) -> list[str]:
        """Return all names of one word of this part, in random order."""
        pool = sorted(
            {word for words in (ADJECTIVES, NOUNS, PEOPLE, CITIES) for word in split_words(words, self.held_out)}
        )
        return self.rng.sample(pool, len(pool))

    def any_words(self, count: int) -> list[str]:
        """Draw words of all lists and both splits, with repetition."""
        return [self.rng.choice(self.rng.choice((ADJECTIVES, NOUNS, PEOPLE, CITIES))) for _ in range(count)]
