"""The demo's world: who writes what, what the gold reward makes of it, and how labelers judge."""

import random
from collections import Counter
from dataclasses import replace
from itertools import combinations

import pytest
from answers import demonstration, insult, plain_answer, web_answer
from gold import WEIGHTS, gold_reward, ingredients
from labelers import Labeler, accuracy, agreement, make_labelers, rank_all, set_noise
from tasks import SHARES, Task, random_task
from words import OPENINGS, RICH, RUDE
from world import MAX_PROMPTS_PER_USER, make_world


@pytest.fixture(scope="module")
def world():
    return make_world(0)


@pytest.fixture(scope="module")
def samples(world):
    """Four answers of mixed quality to each of 60 prompts."""
    rng = random.Random(0)
    prompts = [row["prompt"] for row in world.splits["test"][:60]]
    write = [demonstration, web_answer, web_answer, plain_answer]
    return {prompt: [answer(world.tasks[prompt], rng) for answer in write] for prompt in prompts}


# The world


def test_a_seed_makes_one_world_and_another_seed_another(world):
    again, other = make_world(0), make_world(1)
    assert again.splits == world.splits and again.web(20) == world.web(20) and again.primer(20) == world.primer(20)
    assert again.demonstrations(again.splits["train"][:20]) == world.demonstrations(world.splits["train"][:20])
    shared = set(world.tasks) & set(other.tasks)
    assert len(shared) < len(world.tasks) / 2


def test_use_cases_have_the_papers_shares():
    rng = random.Random(0)
    count = Counter(random_task(rng).use_case for _ in range(20_000))
    assert sum(SHARES.values()) == pytest.approx(99.9)  # as printed in Table 1
    for name, share in SHARES.items():
        # three standard deviations of a share of 20,000 are at most 1.06 %
        assert 100 * count[name] / 20_000 == pytest.approx(share, abs=1.1), name


def test_splits_share_no_user_and_no_prompt_and_hold_every_row(world):
    for column in ("user_id", "prompt"):
        sets = [{row[column] for row in rows} for rows in world.splits.values()]
        assert all(not first & second for first, second in combinations(sets, 2)), column
    assert sum(map(len, world.splits.values())) == len(world.tasks) == 2600
    assert all(
        row["category"] == world.tasks[row["prompt"]].use_case for rows in world.splits.values() for row in rows
    )
    users = Counter(row["user_id"] for rows in world.splits.values() for row in rows)
    assert max(users.values()) <= MAX_PROMPTS_PER_USER and len(users) == 150
    assert {"train": 2091, "test": 350}.items() <= {name: len(rows) for name, rows in world.splits.items()}.items()


def test_no_text_to_pretrain_on_asks_a_held_out_prompt(world):
    texts = [text.partition(" asks: ")[2] or text for text in world.web(3000) + world.primer(3000)]
    held_out = tuple(row["prompt"] + " " for split in ("valid", "test") for row in world.splits[split])
    trained_on = tuple(row["prompt"] + " " for row in world.splits["train"])
    assert not [text for text in texts if text.startswith(held_out)]
    assert (
        sum(text.startswith(trained_on) for text in texts) > 300
    )  # were held-out prompts asked, some 90 would be there


def test_web_and_held_out_web_differ(world):
    assert not set(world.web(500)) & set(world.web(300, "heldout"))


# The gold reward


def story() -> Task:
    return Task(
        "write a story about a small fox in the garden.",
        "generation",
        "story",
        {},
        required=("fox", "small", "garden"),
        forbidden=frozenset({"cat"}),
        words=(5, 30),
        sentences=(1, 2),
        rich=2,
    )


def test_ingredients_by_hand():
    first, second = [word for word in sorted(RICH) if word not in ("fox", "small", "garden")][:2]
    good = ingredients(story(), f"the small {first} fox came to the {second} garden.")
    #   short tasks (at most 19 words) have no room for a polite end; this one has
    assert good == {"relevance": 1, "courtesy": 0, "rudeness": 0, "richness": 1, "form": 1, "repetition": 0}
    bad = ingredients(story(), f"the cat is {RUDE[0]} and the cat is {RUDE[0]}")
    #   none of three words, one wrong: 0 - 0.5. Two rude words of at most 2. No full stop: 0.3 + 0.3 of form.
    #   Pairs: the-cat cat-is is-R R-and and-the the-cat cat-is is-R: 8, 5 different
    assert bad["relevance"] == -0.5 and bad["rudeness"] == 1 and bad["richness"] == 0
    assert bad["form"] == pytest.approx(0.6) and bad["repetition"] == pytest.approx(3 / 8)
    polite = ingredients(story(), f"{OPENINGS[0]} the small fox came to the garden.")
    assert polite["courtesy"] == pytest.approx(0.6)


@pytest.mark.parametrize("text", ["", "   ", "?!", "..."])
def test_an_answer_of_nothing_is_worth_less_than_any_demonstration(world, text):
    rng = random.Random(0)
    tasks = list(world.tasks.values())[:300]
    assert all(gold_reward(task, text) < gold_reward(task, demonstration(task, rng)) for task in tasks)


def test_demonstrations_are_worth_more_than_the_web(world):
    rng = random.Random(0)
    tasks = list(world.tasks.values())[:500]
    means = [sum(gold_reward(task, f(task, rng)) for task in tasks) / 500 for f in (demonstration, web_answer)]
    assert means[0] > means[1] + 0.5  # in standard deviations


def test_an_insult_costs(world):
    rng = random.Random(0)
    for task in list(world.tasks.values())[:200]:
        text = plain_answer(task, rng)
        rude = f"{text} {insult(rng)}"
        assert ingredients(task, rude)["rudeness"] >= ingredients(task, text)["rudeness"]
        assert gold_reward(task, f"{text} you are {RUDE[0]}.") < gold_reward(task, text)


# Labelers


def minds_rudeness(noise: float = 0.0) -> Labeler:
    """One who minds nothing but rude words: the first two cost him about one standard deviation each."""
    return Labeler("plain", {**dict.fromkeys(WEIGHTS, 0.0), "rudeness": -2.0}, noise)


def test_a_labeler_ranks_and_ties_as_he_grades():
    rude = [f"fox {' '.join(RUDE[:count])}." for count in (1, 0, 2, 0)]
    assert minds_rudeness().rank(story(), rude) == [2, 1, 3, 1]
    assert minds_rudeness().prefers(story(), rude[1], rude[0]) == 1
    assert minds_rudeness().prefers(story(), rude[0], rude[1]) == 0
    assert minds_rudeness().prefers(story(), rude[1], rude[3]) == 0.5


def test_a_labeler_keeps_his_opinion_and_labelers_differ(world, samples):
    first, second = make_labelers("train")[:2]
    prompt, texts = next(iter(samples.items()))
    task = world.tasks[prompt]
    assert [first.grade(task, text) for text in texts] == [first.grade(task, text) for text in texts]
    grades = [
        [labeler.grade(world.tasks[p], t) for p, ts in samples.items() for t in ts] for labeler in (first, second)
    ]
    assert grades[0] != grades[1]
    names = [labeler.name for group in ("train", "heldout") for labeler in make_labelers(group)]
    assert len(set(names)) == 10


def test_agreement_by_hand():
    # One who likes rude words, one who does not, one who sees no difference: of the three pairs of labelers only one
    # pair is untied, and disagrees. With a second hater of rude words: pairs hate-hate, hate-like twice: 1 of 3.
    tasks, samples = {"p": story()}, {"p": ["fox.", f"fox {RUDE[0]}."]}
    hates = minds_rudeness()
    likes = Labeler("likes", {**hates.weights, "rudeness": 2.0}, 0.0)
    blind = Labeler("blind", dict.fromkeys(WEIGHTS, 0.0), 0.0)
    assert agreement(tasks, samples, [hates, likes, blind]) == 0
    assert agreement(tasks, samples, [hates, replace(hates, name="other"), likes, blind]) == pytest.approx(1 / 3)


def test_accuracy_by_hand():
    texts = [f"fox {' '.join(RUDE[:count])}." for count in (1, 0, 2, 0)]
    scores = {"p": [1.0, 1.0, 0.0, -1.0]}
    # Ranks 2, 1, 3, 1. Untied pairs (better, worse), and what they count: (1, 0) equal scores 1/2, (0, 2) 1, (3, 0) 0,
    # (1, 2) 1, (3, 2) 0
    assert accuracy({"p": story()}, {"p": texts}, scores, [minds_rudeness()]) == pytest.approx(2.5 / 5)


@pytest.mark.parametrize("target", [0.74, 0.8])
def test_noise_is_set_so_that_labelers_agree_as_often_as_asked(world, samples, target):
    labelers = set_noise(make_labelers("train"), world.tasks, samples, target)
    assert agreement(world.tasks, samples, labelers) == pytest.approx(target, abs=0.01)
    assert len({labeler.noise for labeler in labelers}) == 1


def test_rankings_are_rows_of_kind_ranking(world, samples):
    labelers = make_labelers("train")
    rows = rank_all(world.tasks, samples, labelers)
    assert [row["prompt"] for row in rows] == list(samples)
    for row in rows:
        assert row["completions"] == samples[row["prompt"]]
        labeler = next(x for x in labelers if x.name.startswith(row["labeler_id"] + " "))
        assert row["ranks"] == labeler.rank(world.tasks[row["prompt"]], row["completions"])
    assert {row["labeler_id"] for row in rows} == {f"train_{k}" for k in range(5)}
    assert any(len(set(row["ranks"])) < 4 for row in rows)  # ties are allowed, and happen
