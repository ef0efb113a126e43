"""The vocabulary of scenes: object kinds, colours, textures and printed words, with the grammar of their names."""

from dataclasses import dataclass

# One glyph per line of its category: emoji, then its name; a plural that is not regular follows a slash.
_TABLE = {
    "animal": """
        🐈 cat, 🐕 dog, 🐎 horse, 🐄 cow, 🐖 pig, 🐘 elephant, 🦁 lion, 🐒 monkey, 🐇 rabbit, 🐧 penguin, 🦆 duck,
        🦉 owl, 🐢 turtle, 🐍 snake, 🐊 crocodile, 🐸 frog, 🐟 fish/fish, 🐬 dolphin, 🐙 octopus, 🦀 crab, 🐌 snail,
        🦋 butterfly, 🐝 bee, 🕷 spider, 🦒 giraffe, 🦓 zebra, 🦊 fox, 🐼 panda, 🐓 rooster, 🦔 hedgehog, 🦇 bat,
        🐫 camel, 🦜 parrot, 🦩 flamingo, 🐐 goat, 🐅 tiger, 🐺 wolf/wolves""",
    "food": """
        🍎 apple, 🍌 banana, 🍓 strawberry, 🍋 lemon, 🍍 pineapple, 🍐 pear, 🥕 carrot, 🍄 mushroom, 🥑 avocado,
        🍔 hamburger, 🍩 doughnut, 🎂 cake, 🍉 watermelon, 🥐 croissant, 🥨 pretzel, 🍆 eggplant, 🍪 cookie, 🥥 coconut,
        🥝 kiwi, 🍕 pizza""",
    "plant": "🌲 pine tree, 🌴 palm tree, 🌵 cactus, 🌷 tulip, 🌻 sunflower, 🍁 maple leaf/maple leaves, 🌹 rose",
    "vehicle": """
        🚗 car, 🚌 bus, 🚲 bicycle, 🚂 train, ✈ airplane, 🚀 rocket, 🚁 helicopter, ⛵ sailboat, 🚢 ship, 🚜 tractor,
        🛵 scooter, 🚑 ambulance, 🏍 motorcycle, 🚚 truck""",
    "building": "🏠 house, 🏰 castle, ⛺ tent, ⛪ church",
    "thing": """
        ☂ umbrella, 🔑 key, 🔔 bell, 🎈 balloon, 🎁 gift, 📷 camera, ☎ telephone, 💡 light bulb, 🔨 hammer, 🎸 guitar,
        🎺 trumpet, 🥁 drum, ⚽ soccer ball, 🏀 basketball, 👑 crown, 🎩 top hat, 👢 boot, 👕 shirt, 👗 dress, 💍 ring,
        🧸 teddy bear, 📖 book, ✉ envelope, 🪑 chair, 🛏 bed, 🚪 door, 🕯 candle, ⚓ anchor, ⭐ star, 🌙 moon, 🏆 trophy,
        🧲 magnet, 🪜 ladder, 🧹 broom, 🪣 bucket, 🥄 spoon, 🎒 backpack, ⏰ alarm clock, 📺 television, 📻 radio,
        🎻 violin, 🪁 kite, 🧭 compass, 🔦 flashlight, ✏ pencil, 🪓 axe, ⚙ gear, 🔭 telescope""",
}
_NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine"}

COLOURS = {
    "white": (255, 255, 255),
    "blue": (120, 160, 235),
    "green": (130, 200, 120),
    "yellow": (245, 225, 110),
    "pink": (245, 170, 200),
    "grey": (170, 170, 170),
    "orange": (245, 175, 90),
    "black": (30, 30, 30),
}
TEXTURES = ("plain", "striped", "dotted", "chequered")
# Printed in training; those of the second line only in the split that asks for words never seen.
WORDS = ("OPEN", "SALE", "STOP", "EXIT", "FREE", "CAFE", "ZOO", "FARM", "TAXI", "BANK")
HELD_OUT_WORDS = ("PARK", "FOOD", "BOOKS", "SHOP", "MUSIC", "NEWS", "GIFTS", "HOTEL", "TOYS", "RENT")


@dataclass(frozen=True)
class Kind:
    """A kind of object: its glyph, its name in both numbers, its category."""

    emoji: str
    name: str
    plural: str
    category: str

    def counted(self, count: int) -> str:
        """ "a cat", "an owl", "two wolves"."""
        return with_article(self.name) if count == 1 else f"{number(count)} {self.plural}"

    def named(self, count: int) -> str:
        """The name alone, in the number of `count`."""
        return self.name if count == 1 else self.plural


def number(count: int) -> str:
    """Small numbers in words."""
    return _NUMBERS.get(count, str(count))


def with_article(noun: str) -> str:
    """ "a cat", "an owl"."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def plural_of(name: str) -> str:
    """The regular plural of an English noun."""
    if name.endswith(("s", "x", "ch", "sh")):
        return f"{name}es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return f"{name[:-1]}ies"
    return f"{name}s"


def kinds(count: int | None = None) -> tuple[Kind, ...]:
    """The first `count` kinds (all by default): the categories take turns, so that any number has some of each."""
    queues = [
        [_parse(entry, category) for entry in " ".join(table.split()).split(", ")] for category, table in _TABLE.items()
    ]
    total = sum(map(len, queues))
    # Each category is spread evenly over the whole list.
    placed = sorted(
        ((index + 0.5) / len(queue), order, index) for order, queue in enumerate(queues) for index in range(len(queue))
    )
    return tuple(queues[order][index] for _, order, index in placed)[: total if count is None else count]


def _parse(entry: str, category: str) -> Kind:
    emoji, _, rest = entry.strip().partition(" ")
    name, _, plural = rest.partition("/")
    return Kind(emoji, name, plural or plural_of(name), category)
