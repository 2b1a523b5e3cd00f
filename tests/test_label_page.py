"""The labelling page in a real browser: by mouse, by keyboard alone, with reloads, crashes and two people at once."""

import os
import re
import shutil

import pytest
from labeling.labels import QUESTIONS
from labeling_helpers import Server, read, write

from instructgpt_trl.data import load_rows

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine: apt install chromium")

TASKS = [
    {
        "id": f"t{n}",
        "prompt": f"Prompt number {n}",
        "completions": [f"{n} answer {c}" for c in "abcd"],
        "models": list("wxyz"),
    }
    for n in range(4)
]
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=BROWSER, args=[*OPTIONS, "--disable-component-update"])
        yield one
        one.close()


@pytest.fixture
def server(tmp_path):
    with Server(write(tmp_path / "tasks.jsonl", TASKS), tmp_path / "rankings.jsonl", "--overlap", "0") as one:
        one.output = tmp_path / "rankings.jsonl"
        yield one


def opened(browser, server, name="ann", width=1300):
    """The page of one person, who has given a name; every mistake of the page's script fails the test."""
    page = browser.new_context(viewport={"width": width, "height": 900}).new_page()
    page.set_default_timeout(10_000)
    page.mistakes = []
    page.on("pageerror", lambda error: page.mistakes.append(str(error)))
    page.goto(server.url)
    page.fill("#name", name)
    page.keyboard.press("Enter")
    page.wait_for_selector("#work:not([hidden])")
    return page


def rate_all(page, ratings: str) -> None:
    for rating in ratings:
        page.keyboard.press(rating)
        page.keyboard.press("Enter")
    page.wait_for_selector("#rank:not([hidden])")


def levels(page) -> list[list[int]]:
    """The outputs of each rank, as they stand on the page."""
    rows = page.query_selector_all(".level")
    return [[int(card.get_attribute("data-output")) for card in row.query_selector_all(".card")] for row in rows]


def until(page, selector: str, pattern: str) -> None:
    """Wait for a text; the page lets no script in, so that it is asked from outside."""
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_have_text(re.compile(pattern), timeout=10_000)


def saved(page, server, count: int) -> list[dict]:
    until(page, "#state", "^saved$")
    rows = read(server.output)
    assert len(rows) == count and page.mistakes == []
    return rows


def shown(row: dict, name: str) -> list:
    """A column in the order in which the labeler saw it."""
    return [row[name][k] for k in row["order"]]


def picture(page, name: str) -> None:
    if folder := os.environ.get("PICTURES"):  # to be looked at
        page.screenshot(path=f"{folder}/{name}.png")


def test_by_keyboard_alone(browser, server):
    page = opened(browser, server)
    prompt = page.inner_text("#prompt")
    page.keyboard.press("c")  # the third question, of the first output
    picture(page, "rating")
    rate_all(page, "3373")
    assert levels(page) == [[2], [0, 1, 3]]  # by rating, equal ones tied
    page.keyboard.press("d")  # output D
    page.keyboard.press("ArrowDown")  # out of its tie, below
    assert levels(page) == [[2], [0, 1], [3]]
    page.keyboard.press("ArrowUp")  # back into the tie
    page.keyboard.press("ArrowUp")  # and out of it above
    assert levels(page) == [[2], [3], [0, 1]]
    page.keyboard.press("1")  # with the best
    assert levels(page) == [[2, 3], [0, 1]]
    page.keyboard.press("Control+z")
    assert levels(page) == [[2], [3], [0, 1]]
    picture(page, "ranking")
    page.keyboard.press("Control+Enter")
    (row,) = saved(page, server, 1)
    assert row["prompt"] == prompt and row["labeler_id"] == "ann"
    assert shown(row, "ranks") == [3, 3, 1, 2] and shown(row, "ratings") == [3, 3, 7, 3]
    asked = shown(row, "metadata")
    assert [name for name, value in asked[0].items() if value] == [list(QUESTIONS)[2]]
    assert not any(value for one in asked[1:] for value in one.values())
    until(page, "#prompt", f"^(?!{prompt}$)")
    assert page.inner_text("#progress") == "1 of 4 labels, 1 by you"


def test_keys_wait_for_the_next_task(browser, server):
    """Between `saved` and the next task the last one is still on the page; a key then sends nothing again."""
    page = opened(browser, server)
    rate_all(page, "1234")
    held, asked = [], []
    page.on("request", lambda request: asked.append(request.url) if request.method == "POST" else None)
    page.route("**/api/next*", lambda route: held.append(route))
    page.keyboard.press("Control+Enter")
    saved(page, server, 1)
    page.keyboard.press("Control+Enter")
    page.keyboard.press("a")
    page.keyboard.press("ArrowDown")
    assert levels(page) == [[3], [2], [1], [0]] and page.is_disabled("#save")
    while not held:
        page.wait_for_timeout(20)
    held[0].continue_()
    until(page, "#progress", "^1 of 4")
    assert page.is_visible("#rate") and len(asked) == len(held) == 1
    saved(page, server, 1)


def middle(page, selector: str) -> tuple[float, float]:
    box = page.query_selector(selector).bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def drag(page, output: int, target: str) -> None:
    page.mouse.move(*middle(page, f'.card[data-output="{output}"] .head'))
    page.mouse.down()
    x, y = middle(page, target)
    page.mouse.move(x, y - 30, steps=5)
    page.mouse.move(x, y, steps=5)
    if target.startswith(".gap"):
        picture(page, "dragging")
    page.mouse.up()


def test_by_dragging(browser, server):
    page = opened(browser, server)
    rate_all(page, "4321")
    assert levels(page) == [[0], [1], [2], [3]]
    drag(page, 3, '.gap[data-before="0"]')  # to the top
    assert levels(page) == [[3], [0], [1], [2]]
    drag(page, 2, '.level[data-level="1"] .number')  # onto the second: a tie
    assert levels(page) == [[3], [0, 2], [1]]
    drag(page, 0, '.gap[data-before="3"]')  # out of the tie to the bottom
    assert levels(page) == [[3], [2], [1], [0]]
    drag(page, 1, "#prompt")  # nowhere
    assert levels(page) == [[3], [2], [1], [0]]
    page.click("#save")
    (row,) = saved(page, server, 1)
    assert shown(row, "ranks") == [4, 3, 2, 1]
    assert [row["completions"][k] for k in row["order"]][0].startswith("0 answer")
    assert load_rows(str(server.output), "ranking").num_rows == 1


def test_ratings_by_mouse_come_before_ranks(browser, server):
    page = opened(browser, server)
    assert page.is_disabled("#forward")
    page.keyboard.press("Enter")
    assert page.is_visible("#rate") and page.inner_text("#state") == "rate this output first"
    for output in range(4):
        page.click(f"#steps button:nth-child({4 - output})")  # in any order
        page.click("#rating label:nth-of-type(6)")
        page.check("#questions input[name=moral_judgment]")
    page.click("#steps button:nth-child(4)")
    page.click("#forward")
    assert levels(page) == [[0, 1, 2, 3]]
    page.click("#to-rate")
    assert page.is_checked("#questions input[name=moral_judgment]")


def test_skip_demonstration_and_undo(browser, server):
    page = opened(browser, server)
    first = page.inner_text("#prompt")
    page.click("#skip")
    page.select_option("#reason", "")
    page.click("#skip-dialog button.main")  # a reason is wanted
    page.fill("#reason-text", "no idea")
    picture(page, "skipping")
    page.click("#skip-dialog button.main")
    until(page, "#prompt", f"^(?!{first}$)")
    skips = server.output.with_name("rankings.skips.jsonl")
    assert [(row["prompt"], row["reason"]) for row in read(skips)] == [(first, "no idea")]
    page.click("#undo")
    until(page, "#prompt", f"^{first}$")
    assert read(skips) == []
    page.click("#write")
    page.fill("#demonstration", "A very good answer.\nIn two lines.")
    picture(page, "writing")
    page.click("#write-dialog button.main")
    until(page, "#state", "^saved$")
    (row,) = read(server.output.with_name("rankings.demonstrations.jsonl"))
    assert (row["prompt"], row["completion"]) == (first, "A very good answer.\nIn two lines.")
    assert page.inner_text("#prompt") == first  # it is still to be ranked
    rate_all(page, "1234")
    page.keyboard.press("Control+Enter")
    until(page, "#prompt", f"^(?!{first}$)")
    page.click("#undo")
    page.wait_for_selector("#rank:not([hidden])")
    assert page.inner_text("#prompt") == first and levels(page) == [[3], [2], [1], [0]]
    assert read(server.output) == [] and page.mistakes == []


def test_a_reload_goes_on_where_it_was(browser, server):
    page = opened(browser, server)
    rate_all(page, "5432")
    page.keyboard.press("c")
    page.keyboard.press("ArrowUp")
    before = levels(page)
    assert before == [[0], [1, 2], [3]]
    page.reload()
    page.wait_for_selector("#rank:not([hidden])")
    assert levels(page) == before
    page.keyboard.press("Control+Enter")
    (row,) = saved(page, server, 1)
    assert shown(row, "ranks") == [1, 2, 2, 3] and shown(row, "ratings") == [5, 4, 3, 2]


def test_a_server_that_dies_and_a_browser_that_does(browser, server):
    page = opened(browser, server)
    rate_all(page, "5432")
    server.kill()
    page.keyboard.press("Control+Enter")
    until(page, "#state", "^not saved yet")
    picture(page, "server-gone")
    server.start()
    saved(page, server, 1)
    until(page, "#progress", "^1 of 4")
    # Now the browser goes too, between sending and the answer
    rate_all(page, "1111")
    server.kill()
    page.keyboard.press("Control+Enter")
    until(page, "#state", "^not saved yet")
    context = page.context
    page.close()
    server.start()
    again = context.new_page()
    again.goto(server.url)
    until(again, "#progress", "^2 of 4")
    assert len(read(server.output)) == 2 == len({row["task"] for row in read(server.output)})


def test_nothing_moves_while_an_answer_is_taken_back(browser, server):
    """Nor is the work on one task sent as that on another."""
    page = opened(browser, server)
    rate_all(page, "4321")
    page.keyboard.press("Control+Enter")
    saved(page, server, 1)
    until(page, "#progress", "^1 of 4")
    rate_all(page, "1234")
    second, before = page.inner_text("#prompt"), levels(page)
    held = []
    page.route("**/api/undo", lambda route: held.append(route))
    page.click("#undo")
    while not held:
        page.wait_for_timeout(20)
    page.keyboard.press("Control+Enter")
    page.keyboard.press("a")
    page.keyboard.press("ArrowDown")
    drag(page, 0, '.gap[data-before="4"]')
    assert page.inner_text("#prompt") == second and levels(page) == before and page.is_disabled("#who")
    assert len(read(server.output)) == 1
    held[0].continue_()
    until(page, "#state", "^taken back$")
    assert levels(page) == [[0], [1], [2], [3]] and read(server.output) == []
    page.keyboard.press("Control+Enter")
    (row,) = saved(page, server, 1)
    assert shown(row, "ranks") == [1, 2, 3, 4] and shown(row, "ratings") == [4, 3, 2, 1]


def test_undo_when_the_server_dies_or_the_tasks_change(browser, server, tmp_path):
    """What is taken back is in the browser before it leaves the disk, with the texts that were ranked."""
    page = opened(browser, server)
    first = page.inner_text("#prompt")
    rate_all(page, "4321")
    page.keyboard.press("Control+Enter")
    saved(page, server, 1)
    until(page, "#progress", "^1 of 4")
    changed = [{**row, "completions": ["new", "texts"], "models": ["x", "y"]} for row in TASKS]
    write(tmp_path / "tasks.jsonl", changed)
    page.route("**/api/undo", lambda route: (server.kill(), route.abort()))
    page.click("#undo")
    until(page, "#state", "^not saved yet")
    page.unroute("**/api/undo")
    server.start()
    page.wait_for_selector("#rank:not([hidden])")
    assert page.inner_text("#prompt") == first and levels(page) == [[0], [1], [2], [3]]
    assert read(server.output) == []
    page.keyboard.press("Control+Enter")
    (row,) = saved(page, server, 1)
    assert row["completions"] == TASKS[0]["completions"] and shown(row, "ranks") == [1, 2, 3, 4]


def test_a_new_token_keeps_what_was_not_sent(browser, tmp_path):
    tasks, output = write(tmp_path / "tasks.jsonl", TASKS), tmp_path / "rankings.jsonl"
    one = Server(tasks, output, "--token", "first")
    with one:
        page = browser.new_context().new_page()
        page.goto(f"{one.url}/?token=first")
        page.fill("#name", "ann")
        page.keyboard.press("Enter")
        page.wait_for_selector("#work:not([hidden])")
        page.click("#skip")
        one.kill()
        one.command[-1] = "second"
        one.start()
        page.click("#skip-dialog button.main")
        until(page, "#state", "kept in this browser")
        page.goto(f"{one.url}/?token=second")
        until(page, "#progress", "1 by you")
    assert len(read(output.with_name("rankings.skips.jsonl"))) == 1


def test_two_browsers_at_once_lose_nothing(browser, server):
    pages = [opened(browser, server, name) for name in ("ann", "bob")]
    assert pages[0].inner_text("#prompt") != pages[1].inner_text("#prompt")
    for turn in (1, 2):
        for page in pages:
            rate_all(page, "1234")
        for page in pages:
            page.keyboard.press("Control+Enter")
        for page in pages:
            until(page, "#progress", f"{turn} by you$")
    rows = read(server.output)
    assert sorted(row["task"] for row in rows) == ["t0", "t1", "t2", "t3"]
    assert sorted(row["labeler_id"] for row in rows) == ["ann", "ann", "bob", "bob"]
    for page in pages:
        page.wait_for_selector("#done:not([hidden])")
        assert page.mistakes == []
    picture(pages[0], "done")


def test_texts_are_texts(browser, tmp_path):
    """Markup, long texts, conversations and silence, in a narrow window."""
    talk = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "<b>no</b>"},
        {"role": "user", "content": "?"},
    ]
    said = ["<img src=x onerror=document.title='bad'>", "x" * 100_000, "", "\u202eabc \u05e9\u05dc\u05d5\u05dd"]
    tasks = [{"prompt": talk, "completions": [[{"role": "assistant", "content": text}] for text in said]}]
    with Server(write(tmp_path / "tasks.jsonl", tasks), tmp_path / "rankings.jsonl") as one:
        page = opened(browser, one, width=700)
        assert "<b>no</b>" in page.inner_text("#prompt")
        rate_all(page, "1234")
        picture(page, "odd-texts")
        texts = page.inner_text("#ranks")
        assert said[0] in texts and "(nothing was said)" in texts and page.title() == "Labelling"
        page.keyboard.press("Control+Enter")
        page.wait_for_selector("#done:not([hidden])")
        (row,) = load_rows(str(tmp_path / "rankings.jsonl"), "ranking", allow_empty=True)
        assert [one[0]["content"] for one in row["completions"]] == said and page.mistakes == []
