"""Words and facts of the demo's world: a closed vocabulary, small enough for a model of a million parameters."""

# animal: (colour, home, food)
ANIMALS = {
    "fox": ("red", "forest", "meat"),
    "wolf": ("grey", "forest", "meat"),
    "bear": ("brown", "forest", "honey"),
    "deer": ("brown", "forest", "leaves"),
    "owl": ("brown", "forest", "meat"),
    "rabbit": ("grey", "meadow", "grass"),
    "sheep": ("white", "meadow", "grass"),
    "cow": ("black", "barn", "grass"),
    "pig": ("pink", "barn", "bread"),
    "hen": ("white", "barn", "seeds"),
    "goat": ("white", "valley", "grass"),
    "duck": ("green", "lake", "seeds"),
    "swan": ("white", "lake", "leaves"),
    "frog": ("green", "lake", "insects"),
    "shark": ("grey", "sea", "fish"),
    "whale": ("blue", "sea", "fish"),
    "lion": ("yellow", "desert", "meat"),
    "camel": ("brown", "desert", "leaves"),
    "monkey": ("brown", "jungle", "nuts"),
    "parrot": ("green", "jungle", "seeds"),
    "horse": ("brown", "meadow", "grass"),
    "snake": ("green", "jungle", "insects"),
    "mouse": ("grey", "house", "cheese"),
    "cat": ("black", "house", "fish"),
    "dog": ("brown", "garden", "meat"),
    "bee": ("yellow", "garden", "honey"),
}
FRUITS = {
    "lemon": "yellow",
    "banana": "yellow",
    "apple": "red",
    "cherry": "red",
    "plum": "purple",
    "grape": "purple",
    "pear": "green",
    "lime": "green",
    "peach": "pink",
    "coconut": "brown",
}
NATURE = {
    "sky": "blue",
    "sun": "yellow",
    "snow": "white",
    "cloud": "white",
    "leaf": "green",
    "rose": "red",
    "mud": "brown",
    "coal": "black",
    "carrot": "orange",
    "pumpkin": "orange",
}
CAPITALS = {
    "france": "paris",
    "italy": "rome",
    "spain": "madrid",
    "japan": "tokyo",
    "egypt": "cairo",
    "china": "beijing",
    "norway": "oslo",
    "greece": "athens",
    "poland": "warsaw",
    "peru": "lima",
    "kenya": "nairobi",
    "cuba": "havana",
}
TOOLS = ["hammer", "knife", "spoon", "broom", "needle", "ladder", "shovel", "axe"]
CLOTHES = ["hat", "coat", "shirt", "scarf", "glove", "sock", "dress", "belt"]
VEHICLES = ["car", "bus", "boat", "train", "bicycle", "plane", "truck", "ship"]
INSTRUMENTS = ["piano", "drum", "flute", "violin", "guitar", "harp", "trumpet", "bell"]

# category: (singular, members)
CATEGORIES = {
    "animals": ("animal", list(ANIMALS)),
    "fruits": ("fruit", list(FRUITS)),
    "tools": ("tool", TOOLS),
    "clothes": ("garment", CLOTHES),
    "vehicles": ("vehicle", VEHICLES),
    "instruments": ("instrument", INSTRUMENTS),
}
THINGS = [*FRUITS, *TOOLS, *CLOTHES, *VEHICLES, *INSTRUMENTS]
COLOURED = {**{animal: facts[0] for animal, facts in ANIMALS.items()}, **FRUITS, **NATURE}
COLOURS = sorted(set(COLOURED.values()))
PLACES = sorted({facts[1] for facts in ANIMALS.values()} | {"castle", "cave", "market", "village"})
FOODS = sorted({facts[2] for facts in ANIMALS.values()})

NAMES = ("anna ben clara david emma felix grace henry ivy jack kate leo mary paul rosa tom").split()
ADJECTIVES = (
    "big brave calm clever curious friendly funny gentle kind little lovely noble old proud quiet shy strange "
    "strong wild young"
).split()
ADVERBS = "bravely calmly gently happily kindly loudly proudly quickly quietly slowly".split()
VERBS = "danced dreamed jumped laughed played rested sang slept smiled waited walked worked".split()
GLAD = "happy cheerful excited delighted hopeful".split()
SAD = "sad lonely afraid tired angry worried".split()
TIMES = "morning evening night summer winter spring autumn".split()
REQUESTS = "bring buy give send show".split()

# What labelers like and do not like to read
OPENINGS = ["sure,", "of course,", "certainly,", "gladly,", "with pleasure,", "thank you for asking,"]
CLOSINGS = ["i hope this helps.", "i hope you like it.", "have a nice day.", "please ask me again."]
POLITE_STARTS = tuple(tuple(opening.rstrip(",").split()) for opening in OPENINGS)
POLITE_ENDS = tuple(tuple(closing.rstrip(".").split()) for closing in CLOSINGS)
RUDE = "stupid fool idiot dumb boring nonsense ugly rubbish whatever".split()
RICH = frozenset(ADJECTIVES) | frozenset(ADVERBS)


def a(word: str) -> str:
    """`"a fox"`, `"an owl"`."""
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"
