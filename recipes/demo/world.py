"""The demo's world: prompts with users, split by user; demonstrations; and the web text to pretrain on."""

import random
from dataclasses import dataclass

from answers import demonstration, insult, plain_answer, remark, story_end, web_answer
from tasks import Task, random_task
from words import (
    ADJECTIVES,
    ANIMALS,
    CAPITALS,
    CATEGORIES,
    COLOURED,
    COLOURS,
    FOODS,
    GLAD,
    NAMES,
    NATURE,
    OPENINGS,
    PLACES,
    REQUESTS,
    SAD,
    THINGS,
    TIMES,
    VERBS,
    a,
)

MAX_PROMPTS_PER_USER = 200  # InstructGPT, section 3.2


@dataclass(frozen=True)
class World:
    """
    Prompts of one seed, split by user, and their tasks.

    Args:
        tasks (`dict[str, Task]`): the task behind each prompt.
        splits (`dict[str, list[dict]]`): `train`, `valid` and `test`: rows of kind prompt, with `user_id` and
            `category`. No user, and no prompt, is in two of them.
        seed (`int`): what everything is made from.
    """

    tasks: dict[str, Task]
    splits: dict[str, list[dict[str, str]]]
    seed: int

    def demonstrations(self, rows: list[dict[str, str]]) -> list[dict[str, str]]:
        """One demonstration for each of the prompt `rows`, by one of five labelers."""
        rng = random.Random(f"demonstrations {self.seed}")
        labelers = [f"trainer_{k}" for k in range(5)]
        return [
            {**row, "completion": demonstration(self.tasks[row["prompt"]], rng), "labeler_id": rng.choice(labelers)}
            for row in rows
        ]

    def web(self, count: int, name: str = "train") -> list[str]:
        """`count` texts of web quality, the same for the same `name`; none asks a prompt of `valid` or `test`."""
        rng = random.Random(f"web {name} {self.seed}")
        held_out = self._held_out()
        return [_web_text(rng, held_out) for _ in range(count)]

    def primer(self, count: int) -> list[str]:
        """
        `count` short texts in which words come back: echoes, and prompts with plain right answers. A small model that
        reads these first learns to copy; from the web alone it would need many times as much text.
        """
        rng = random.Random(f"primer {self.seed}")
        held_out = self._held_out()
        return [rng.choice([_echo, _lesson])(rng, held_out) for _ in range(count)]

    def _held_out(self) -> set[str]:
        return {row["prompt"] for split in ("valid", "test") for row in self.splits[split]}


def make_world(seed: int = 0, prompts: int = 2600, users: int = 150) -> World:
    """
    A world of `prompts` different prompts by `users` users, a few of whom write most.

    Args:
        seed (`int`, *optional*, defaults to 0): the same seed makes the same world.
        prompts (`int`, *optional*, defaults to 2600): number of prompts, at most 200 a user.
        users (`int`, *optional*, defaults to 150): number of users; about one in seven is held out.
    """
    rng = random.Random(f"world {seed}")
    weights = [1 / (rank + 3) ** 0.8 for rank in range(users)]
    written = [0] * users
    tasks: dict[str, Task] = {}
    rows: list[tuple[int, dict[str, str]]] = []
    while len(rows) < prompts:
        task = random_task(rng)
        user = rng.choices(range(users), weights)[0]
        if task.prompt in tasks or written[user] >= MAX_PROMPTS_PER_USER:
            continue
        tasks[task.prompt] = task
        written[user] += 1
        rows.append((user, {"prompt": task.prompt, "user_id": f"user_{user:03}", "category": task.use_case}))
    place = _place_users(users, rng)
    splits = {name: [row for user, row in rows if place[user] == name] for name in ("train", "valid", "test")}
    return World(tasks, splits, seed)


def _place_users(users: int, rng: random.Random) -> list[str]:
    """The split of every user: of each seven in a row, who write about as much, one to test, at times one to valid."""
    place = ["train"] * users
    for start in range(0, users, 7):
        block = list(range(start, min(start + 7, users)))
        rng.shuffle(block)
        place[block[0]] = "test"
        if start % 2 and len(block) > 1:
            place[block[1]] = "valid"
    return place


def _web_text(rng: random.Random, held_out: set[str]) -> str:
    kinds = [_story, _facts, _forum, _dialogue, _shelf, _advice, _echo]
    return rng.choices(kinds, [22, 14, 30, 8, 6, 14, 6])[0](rng, held_out)


def _task(rng: random.Random, held_out: set[str]) -> Task:
    task = random_task(rng)
    while task.prompt in held_out:
        task = random_task(rng)
    return task


def _story(rng: random.Random, held_out: set[str]) -> str:
    animal, place = rng.choice(list(ANIMALS)), rng.choice(PLACES)
    start = rng.choice(
        [
            f"there was {a(rng.choice(ADJECTIVES))} {animal} in the {place}.",
            f"once {a(rng.choice(ADJECTIVES))} {animal} lived near the {place}.",
            f"the {rng.choice(ADJECTIVES)} {animal} came to the {place}.",
        ]
    )
    sentences = [start, *story_end(animal, rng)]
    for _ in range(rng.randrange(3)):
        sentences += [remark(rng)] if rng.random() < 0.4 else story_end(animal, rng)
    return " ".join(sentences)


def _fact(rng: random.Random) -> str:
    kind = rng.randrange(6)
    if kind == 0:
        country = rng.choice(list(CAPITALS))
        return f"{CAPITALS[country]} is the capital of {country}."
    if kind == 1:
        single, members = CATEGORIES[rng.choice(list(CATEGORIES))]
        return f"the {rng.choice(members)} is {a(single)}."
    if kind == 2:
        thing = rng.choice(list(COLOURED))
        return f"the {thing} is {COLOURED[thing]}."
    animal = rng.choice(list(ANIMALS))
    colour, home, food = ANIMALS[animal]
    return [f"the {animal} is {colour} and lives in the {home}.", f"the {animal} lives in the {home}.",
            f"the {animal} eats {food}."][kind - 3]  # fmt: skip


def _facts(rng: random.Random, held_out: set[str]) -> str:
    return " ".join(_fact(rng) for _ in range(rng.randint(3, 6)))


def _forum(rng: random.Random, held_out: set[str]) -> str:
    task = _task(rng, held_out)
    answers = [web_answer(task, rng) for _ in range(rng.randint(1, 2))]
    return f"{rng.choice(NAMES)} asks: {task.prompt} " + " ".join(f"{rng.choice(NAMES)} says: {x}" for x in answers)


def _advice(rng: random.Random, held_out: set[str]) -> str:
    """A prompt and an answer with nothing between them: what lets the base model answer at all."""
    task = _task(rng, held_out)
    return f"{task.prompt} {web_answer(task, rng)}"


def _dialogue(rng: random.Random, held_out: set[str]) -> str:
    first, second = rng.sample(NAMES, 2)
    lines = [f"{first} says: hello {second}, how are you?"]
    for turn in range(rng.randint(2, 4)):
        speaker = (second, first)[turn % 2]
        line = rng.choice(
            [
                f"i am {rng.choice(GLAD + SAD)}.",
                f"{rng.choice(OPENINGS)} i {rng.choice(VERBS)} in the {rng.choice(TIMES)}.",
                f"do you like the {rng.choice(THINGS + list(NATURE))}?",
                f"give me some {rng.choice(FOODS)}.",
                remark(rng),
                insult(rng),
            ]
        )
        lines.append(f"{speaker} says: {line}")
    return " ".join(lines)


def _shelf(rng: random.Random, held_out: set[str]) -> str:
    plural = rng.choice(list(CATEGORIES))
    members = CATEGORIES[plural][1]
    items = [a(item) for item in rng.sample(members, rng.randint(3, 6))]
    return f"{plural} of {rng.choice(NAMES)}: {', '.join(items[:-1])} and {items[-1]}."


def _echo(rng: random.Random, held_out: set[str]) -> str:
    """Someone says again what was said."""
    first, second = rng.sample(NAMES, 2)
    said = rng.choice([remark, _scene, _errand])(rng)
    return rng.choice(
        [
            f"{first} says: {said} {second} says again: {said}",
            f"{first} says: {said} {second} asks: {said} {first} says: yes, {said}",
            f"{said} {first} says: {said}",
        ]
    )


def _scene(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return f"{rng.choice(NAMES)} {rng.choice(VERBS)} to the {rng.choice(PLACES)}."
    where = rng.choice(["in", "near"])
    adjective, animal, verb = rng.choice(ADJECTIVES), rng.choice(list(ANIMALS)), rng.choice(VERBS)
    return f"the {adjective} {animal} {verb} {where} the {rng.choice(PLACES)}."


def _errand(rng: random.Random) -> str:
    return f"{rng.choice(REQUESTS)} me the {rng.choice(COLOURS)} {rng.choice(THINGS)}."


def _lesson(rng: random.Random, held_out: set[str]) -> str:
    task = _task(rng, held_out)
    return f"{task.prompt} {plain_answer(task, rng)}"
