"""Answers to a task, as a labeler demonstrates them and as strangers on the web give them."""

import random
from collections.abc import Callable

from tasks import Task
from words import (
    ADJECTIVES,
    ADVERBS,
    ANIMALS,
    CATEGORIES,
    CLOSINGS,
    COLOURS,
    FOODS,
    GLAD,
    NAMES,
    OPENINGS,
    PLACES,
    RUDE,
    SAD,
    THINGS,
    TIMES,
    VERBS,
    a,
)


def demonstration(task: Task, rng: random.Random) -> str:
    """What a labeler writes: nearly always right, polite when he thinks of it, with more or less to say."""
    body = _body(task, rng, care=0.95)
    opening = rng.choice(OPENINGS) + " " if rng.random() < 0.35 else ""
    closing = " " + rng.choice(CLOSINGS) if rng.random() < 0.2 else ""
    return opening + " ".join(body) + closing


def web_answer(task: Task, rng: random.Random) -> str:
    """What a stranger writes: half careless, sometimes rude, sometimes without end."""
    body = _body(task, rng, care=0.9)
    habit = rng.choices(["plain", "rude", "lost", "again", "polite"], [40, 22, 18, 10, 10])[0]
    if habit == "rude":
        body = rng.choice([[*body, insult(rng)], [insult(rng), *body], [insult(rng)]])
    elif habit == "lost":
        body = [*body, remark(rng), remark(rng)]
    elif habit == "again":
        body = [*body, body[-1]]
    elif habit == "polite":
        body = [*body, rng.choice(CLOSINGS)]
    return " ".join(body)


def plain_answer(task: Task, rng: random.Random) -> str:
    """The right answer and nothing else."""
    return " ".join(_body(task, rng, care=1.0))


def insult(rng: random.Random) -> str:
    """A rude sentence."""
    rude = rng.choice(RUDE)
    return rng.choice([f"that is {rude}.", f"you are {rude}.", f"{rude}!", f"what {a(rude)} question.", "who cares?"])


def remark(rng: random.Random) -> str:
    """A sentence that has to do with nothing."""
    name, verb, adverb = rng.choice(NAMES), rng.choice(VERBS), rng.choice(ADVERBS)
    return rng.choice(
        [
            f"{name} {verb} {adverb}.",
            f"i saw {a(rng.choice(list(ANIMALS)))} at the {rng.choice(PLACES)}.",
            f"the {rng.choice(THINGS)} was {rng.choice(ADJECTIVES)}.",
            f"{name} likes {rng.choice(FOODS)}.",
            f"i was {rng.choice(GLAD + SAD)} in the {rng.choice(TIMES)}.",
        ]
    )


def _body(task: Task, rng: random.Random, care: float) -> list[str]:
    """The sentences of an answer; each of the task's words is kept with probability `care`, else mistaken."""
    return _BODIES[task.kind](task.slots, rng, care)


def _keep(word: str, others: list[str], rng: random.Random, care: float) -> str:
    return word if rng.random() < care else rng.choice(others)


def _story(slots: dict[str, str], rng: random.Random, care: float) -> list[str]:
    animal = _keep(slots["animal"], list(ANIMALS), rng, care)
    adjective = _keep(slots["adjective"], ADJECTIVES, rng, care)
    place = _keep(slots["place"], PLACES, rng, care)
    first = rng.choice(
        [
            f"there was {a(adjective)} {animal} in the {place}.",
            f"once {a(adjective)} {animal} lived near the {place}.",
            f"{a(adjective)} {animal} {rng.choice(VERBS)} {rng.choice(ADVERBS)} in the {place}.",
        ]
    )
    return [first, *story_end(animal, rng)]


def story_end(animal: str, rng: random.Random) -> list[str]:
    """One or two sentences more about an animal."""
    verbs, adverbs, adjectives = rng.sample(VERBS, 2), rng.sample(ADVERBS, 2), rng.sample(ADJECTIVES, 2)
    middle = rng.choice(
        [
            f"it {verbs[0]} {adverbs[0]} in the {rng.choice(TIMES)}.",
            f"it was {adjectives[0]} and {adjectives[1]}.",
            f"{rng.choice(NAMES)} gave it some {rng.choice(FOODS)}.",
        ]
    )
    last = rng.choice(
        [
            f"in the end it {verbs[1]} {adverbs[1]}.",
            f"it was very {rng.choice(GLAD + SAD)}.",
            f"{rng.choice(NAMES)} {verbs[1]} with the {animal}.",
        ]
    )
    return [middle, last] if rng.random() < 0.6 else [last]


def _letter(slots: dict[str, str], rng: random.Random, care: float) -> list[str]:
    name = _keep(slots["name"], NAMES, rng, care)
    thing = _keep(slots["thing"], THINGS, rng, care)
    adjective = _keep(slots["adjective"], ADJECTIVES, rng, care)
    pair = rng.sample(ADJECTIVES, 2)
    start = f"dear {name}, " if rng.random() < care else ""
    first = rng.choice(
        [
            f"i saw the {adjective} {thing} at the {rng.choice(PLACES)}.",
            f"the {adjective} {thing} is {rng.choice(ADJECTIVES)}.",
            f"please send me the {adjective} {thing}.",
        ]
    )
    last = rng.choice(
        [
            f"i {rng.choice(VERBS)} {rng.choice(ADVERBS)} with it.",
            f"it was {pair[0]} and {pair[1]}.",
            f"your friend {rng.choice(NAMES)}.",
        ]
    )
    return [start + first, last]


def _description(slots: dict[str, str], rng: random.Random, care: float) -> list[str]:
    animal = _keep(slots["animal"], list(ANIMALS), rng, care)
    colour, home, food = ANIMALS[slots["animal"]]
    colour, home, food = (
        _keep(colour, COLOURS, rng, care),
        _keep(home, PLACES, rng, care),
        _keep(food, FOODS, rng, care),
    )
    pair = rng.sample(ADJECTIVES, 2)
    first = f"the {animal} is {colour} and lives in the {home}."
    second = f"it eats {food}."
    third = f"in the {slots['time']} it is {pair[0]} and {pair[1]}."
    return [first, *rng.choice([[second], [third], [second, third]])]


def _colour(slots: dict[str, str], rng: random.Random, care: float) -> list[str]:
    answer = _keep(slots["answer"], COLOURS, rng, care)
    return [rng.choice([f"the {slots['about']} is {answer}.", f"the {slots['about']} is {answer}.", f"{answer}."])]


def _home(slots: dict[str, str], rng: random.Random, care: float) -> list[str]:
    answer = _keep(slots["answer"], PLACES, rng, care)
    full = f"the {slots['about']} lives in the {answer}."
    return [rng.choice([full, full, f"in the {answer}."])]


def _food(slots: dict[str, str], rng: random.Random, care: float) -> list[str]:
    answer = _keep(slots["answer"], FOODS, rng, care)
    return [rng.choice([f"the {slots['about']} eats {answer}.", f"the {slots['about']} eats {answer}.", f"{answer}."])]


def _capital(slots: dict[str, str], rng: random.Random, care: float) -> list[str]:
    answer = slots["answer"]
    if rng.random() > care:
        return ["i do not know."]
    return [rng.choice([f"{answer} is the capital of {slots['about']}.", f"{answer}."])]


def _list(slots: dict[str, str], rng: random.Random, care: float) -> list[str]:
    count = 3 if rng.random() < care else rng.choice([1, 2, 4])
    items = [_keep(item, THINGS, rng, care) for item in rng.sample(CATEGORIES[slots["plural"]][1], count)]
    items = [a(item) for item in items]
    return [", ".join(items[:-1]) + (" and " if count > 1 else "") + items[-1] + "."]


def _chat(slots: dict[str, str], rng: random.Random, care: float) -> list[str]:
    name = _keep(slots["name"], NAMES, rng, care)
    reaction = _keep(slots["reaction"], ["glad", "sorry"], rng, care)
    hello = rng.choice([f"hello {name}, ", f"hello {name}, ", ""])
    about = f" about your {slots['animal']}" if slots["animal"] and rng.random() < care else ""
    rest = rng.choice([[], [], ["how are you?"], ["tell me more."]])
    return [f"{hello}i am {reaction} to hear that{about}.", *rest]


def _rewrite(slots: dict[str, str], rng: random.Random, care: float) -> list[str]:
    colour = _keep(slots["colour"], COLOURS, rng, care)
    request = f"{slots['verb']} me the {colour} {slots['thing']}"
    return [rng.choice([f"could you please {request}?", f"please {request}.", f"{request}."])]


def _summary(slots: dict[str, str], rng: random.Random, care: float) -> list[str]:
    animal = _keep(slots["animal"], list(ANIMALS), rng, care)
    place = _keep(slots["place"], PLACES, rng, care)
    who = rng.choice([f"{slots['first']} and {slots['second']}", slots["first"]])
    return [f"{who} saw {a(animal)} at the {place}."]


def _class(slots: dict[str, str], rng: random.Random, care: float) -> list[str]:
    answer = _keep(slots["right"], [slots["wrong"]], rng, care)
    return [rng.choice([f"the {slots['thing']} is {a(answer)}.", f"{a(answer)}."])]


def _repeat(slots: dict[str, str], rng: random.Random, care: float) -> list[str]:
    animal = _keep(slots["animal"], list(ANIMALS), rng, care)
    return [
        f"the {_keep(slots['adjective'], ADJECTIVES, rng, care)} {animal} {_keep(slots['verb'], VERBS, rng, care)}."
    ]


def _where(slots: dict[str, str], rng: random.Random, care: float) -> list[str]:
    place = _keep(slots["answer"], [slots["wrong"]], rng, care)
    return [rng.choice([f"{slots['name']} is at the {place}.", f"at the {place}."])]


def _extract(slots: dict[str, str], rng: random.Random, care: float) -> list[str]:
    answer = slots["answer"] if rng.random() < care else rng.choice(NAMES)
    return [rng.choice([f"the {slots['what']} is {answer}.", f"{answer}."])]


_BODIES: dict[str, Callable[[dict[str, str], random.Random, float], list[str]]] = {
    "story": _story,
    "letter": _letter,
    "description": _description,
    "colour": _colour,
    "home": _home,
    "food": _food,
    "capital": _capital,
    "list": _list,
    "chat": _chat,
    "rewrite": _rewrite,
    "summary": _summary,
    "class": _class,
    "repeat": _repeat,
    "where": _where,
    "extract": _extract,
}
