"""The ten use cases as tasks: what a prompt asks, and what a good answer must and must not contain."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from words import (
    ADJECTIVES,
    ANIMALS,
    CAPITALS,
    CATEGORIES,
    CLOTHES,
    COLOURED,
    COLOURS,
    FOODS,
    GLAD,
    NAMES,
    PLACES,
    REQUESTS,
    RUDE,
    SAD,
    THINGS,
    TIMES,
    VERBS,
    a,
)

# Share of each use case among prompts: InstructGPT, Table 1 (percent)
SHARES = {
    "generation": 45.6,
    "open_qa": 12.4,
    "brainstorming": 11.2,
    "chat": 8.4,
    "rewrite": 6.6,
    "summarization": 4.2,
    "classification": 3.5,
    "other": 3.5,
    "closed_qa": 2.6,
    "extract": 1.9,
}


@dataclass(frozen=True, eq=False)  # a task is itself only: cheap to hash, for the cache of gold.py
class Task:
    """
    A prompt and what the gold reward looks for in its answer.

    Args:
        prompt (`str`): the text that the model sees.
        use_case (`str`): one of the ten keys of `SHARES`.
        kind (`str`): the template's name; `answers.py` writes an answer for each.
        slots (`dict[str, str]`): the words that fill the template.
        required (`tuple[str, ...]`): words that a good answer mentions.
        forbidden (`frozenset[str]`): words that make the answer wrong.
        members (`frozenset[str]`): for lists: three different ones of these are wanted.
        words (`tuple[int, int]`): shortest and longest good answer, in words, courtesies included.
        sentences (`tuple[int, int]`): fewest and most sentences, courtesies not included.
        rich (`int`): number of different descriptive words that is enough; 0 where description is not asked for.
    """

    prompt: str
    use_case: str
    kind: str
    slots: dict[str, str]
    required: tuple[str, ...] = ()
    forbidden: frozenset[str] = frozenset()
    members: frozenset[str] = frozenset()
    words: tuple[int, int] = (3, 16)
    sentences: tuple[int, int] = (1, 1)
    rich: int = 0


def _generation(rng: random.Random) -> Task:
    kind = rng.choices(["story", "letter", "description"], [6, 2, 2])[0]
    animal, adjective, place = rng.choice(list(ANIMALS)), rng.choice(ADJECTIVES), rng.choice(PLACES)
    if kind == "story":
        start = rng.choice(["write a story about", "tell me a story about", "write a short tale about"])
        where = rng.choice(["in the", "near the"])
        return Task(
            f"{start} {a(adjective)} {animal} {where} {place}.",
            "generation",
            kind,
            {"animal": animal, "adjective": adjective, "place": place},
            required=(animal, adjective, place),
            forbidden=frozenset(ANIMALS) - {animal},
            words=(14, 36),
            sentences=(2, 3),
            rich=4,
        )
    if kind == "letter":
        name, thing = rng.choice(NAMES), rng.choice(THINGS)
        return Task(
            rng.choice(["write a letter to", "write a note to"]) + f" {name} about the {adjective} {thing}.",
            "generation",
            kind,
            {"name": name, "thing": thing, "adjective": adjective},
            required=("dear", name, thing, adjective),
            words=(10, 32),
            sentences=(2, 3),
            rich=3,
        )
    colour, home, food = ANIMALS[animal]
    time = rng.choice(TIMES)
    return Task(
        rng.choice(["describe", "tell me about"]) + f" {a(animal)} in the {time}.",
        "generation",
        kind,
        {"animal": animal, "time": time},
        required=(animal, colour, home, food),
        forbidden=frozenset(COLOURS) - {colour} | frozenset(FOODS) - {food},
        words=(10, 32),
        sentences=(2, 3),
        rich=2,
    )


def _open_qa(rng: random.Random) -> Task:
    kind = rng.choice(["colour", "colour", "home", "food", "capital"])
    start = rng.choice(["", "tell me,", "please tell me,", "i wonder,", "do you know,"])
    start = start + " " if start else ""
    if kind == "colour":
        thing = rng.choice(list(COLOURED))
        text = rng.choice([f"what colour is the {thing}?", f"which colour has the {thing}?"])
        answer, others, about = COLOURED[thing], COLOURS, thing
    elif kind == "capital":
        about = rng.choice(list(CAPITALS))
        text = rng.choice([f"what is the capital of {about}?", f"which city is the capital of {about}?"])
        answer, others = CAPITALS[about], list(CAPITALS.values())
    else:
        about = rng.choice(list(ANIMALS))
        texts, column, others = {
            "home": ([f"where does the {about} live?", f"where is the home of the {about}?"], 1, PLACES),
            "food": ([f"what does the {about} eat?", f"what is the food of the {about}?"], 2, FOODS),
        }[kind]
        text, answer = rng.choice(texts), ANIMALS[about][column]
    return Task(
        start + text,
        "open_qa",
        kind,
        {"about": about, "answer": answer},
        required=(about, answer),
        forbidden=frozenset(others) - {answer},
    )


def _brainstorming(rng: random.Random) -> Task:
    plural = rng.choice(list(CATEGORIES))
    start = rng.choice(["list three", "name three", "give me three", "think of three"])
    name, place = rng.choice(NAMES), rng.choice(PLACES)
    ending = rng.choice(["", f" for {name}", f" for the {place}", f" for {name} in the {place}"])
    return Task(
        f"{start} {plural}{ending}.",
        "brainstorming",
        "list",
        {"plural": plural},
        members=frozenset(CATEGORIES[plural][1]),
        words=(6, 20),
    )


def _chat(rng: random.Random) -> Task:
    name, feeling = rng.choice(NAMES), rng.choice(GLAD + SAD)
    animal = rng.choice(list(ANIMALS))
    start = rng.choice(["hello", f"good {rng.choice(['morning', 'evening'])}"])
    if rng.random() < 0.5:
        text = f"{start}, my name is {name} and i am {feeling}."
        required: tuple[str, ...] = (name,)
    else:
        text = f"{start}, i am {name}. my {animal} makes me {feeling}."
        required = (name, animal)
    reaction, other = ("glad", "sorry") if feeling in GLAD else ("sorry", "glad")
    return Task(
        text,
        "chat",
        "chat",
        {"name": name, "animal": animal if "my " + animal in text else "", "reaction": reaction},
        required=(*required, reaction),
        forbidden=frozenset({other}) | frozenset(NAMES) - {name},
        words=(6, 22),
        sentences=(1, 2),
    )


def _rewrite(rng: random.Random) -> Task:
    verb, colour, thing = rng.choice(REQUESTS), rng.choice(COLOURS), rng.choice(CLOTHES + ["apple", "flute", "drum"])
    start = rng.choice(["rewrite politely:", "make this kind:", "say this nicely:"])
    return Task(
        f"{start} {verb} me the {colour} {thing}, you {rng.choice(RUDE[:3])}!",
        "rewrite",
        "rewrite",
        {"verb": verb, "colour": colour, "thing": thing},
        required=("please", verb, colour, thing),
        forbidden=frozenset(RUDE),
    )


def _summarization(rng: random.Random) -> Task:
    first, second = rng.sample(NAMES, 2)
    animal, place, verb = rng.choice(list(ANIMALS)), rng.choice(PLACES), rng.choice(VERBS)
    start = rng.choice(["summarize:", "make this short:"])
    return Task(
        f"{start} {first} {verb} to the {place}. there {first} saw {a(animal)}. later {second} came too.",
        "summarization",
        "summary",
        {"first": first, "second": second, "animal": animal, "place": place},
        required=(first, second, animal, place),
        words=(6, 16),
    )


def _classification(rng: random.Random) -> Task:
    right, wrong = rng.sample(list(CATEGORIES), 2)
    thing = rng.choice(CATEGORIES[right][1])
    pair = [CATEGORIES[right][0], CATEGORIES[wrong][0]]
    rng.shuffle(pair)
    return Task(
        f"is the {thing} {a(pair[0])} or {a(pair[1])}?",
        "classification",
        "class",
        {"thing": thing, "right": CATEGORIES[right][0], "wrong": CATEGORIES[wrong][0]},
        required=(thing, CATEGORIES[right][0]),
        forbidden=frozenset({CATEGORIES[wrong][0]}),
    )


def _other(rng: random.Random) -> Task:
    adjective, animal, verb = rng.choice(ADJECTIVES), rng.choice(list(ANIMALS)), rng.choice(VERBS)
    return Task(
        rng.choice(["repeat:", "say again:"]) + f" the {adjective} {animal} {verb}.",
        "other",
        "repeat",
        {"adjective": adjective, "animal": animal, "verb": verb},
        required=(adjective, animal, verb),
    )


def _closed_qa(rng: random.Random) -> Task:
    first, second = rng.sample(NAMES, 2)
    here, there = rng.sample(PLACES, 2)
    asked, answer, wrong = rng.choice([(first, here, there), (second, there, here)])
    return Task(
        f"{first} is at the {here}. {second} is at the {there}. where is {asked}?",
        "closed_qa",
        "where",
        {"name": asked, "answer": answer, "wrong": wrong},
        required=(asked, answer),
        forbidden=frozenset({wrong}),
    )


def _extract(rng: random.Random) -> Task:
    name, place = rng.choice(NAMES), rng.choice(PLACES)
    animal, colour = rng.choice(list(ANIMALS)), rng.choice(COLOURS)
    what, answer = rng.choice([("animal", animal), ("name", name), ("place", place), ("colour", colour)])
    return Task(
        f"find the {what}: {name} saw the {colour} {animal} at the {place}.",
        "extract",
        "extract",
        {"what": what, "answer": answer},
        required=(answer,),
        forbidden=frozenset({animal, name, place, colour}) - {answer},
        words=(3, 14),
    )


BUILDERS: dict[str, Callable[[random.Random], Task]] = {
    "generation": _generation,
    "open_qa": _open_qa,
    "brainstorming": _brainstorming,
    "chat": _chat,
    "rewrite": _rewrite,
    "summarization": _summarization,
    "classification": _classification,
    "other": _other,
    "closed_qa": _closed_qa,
    "extract": _extract,
}


def random_task(rng: random.Random) -> Task:
    """A task of a use case drawn by the paper's shares."""
    return BUILDERS[rng.choices(list(SHARES), list(SHARES.values()))[0]](rng)
