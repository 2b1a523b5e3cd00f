"""The labelling server: nothing lost, nothing double, nothing shown that should not be."""

import json
import random
import threading
import time
import urllib.error
from http.client import HTTPException

import label
import pytest
from labeling.labels import QUESTIONS, Labels, Refused, agreement
from labeling.log import Log
from labeling.tasks import TaskFile, read_tasks
from labeling_helpers import Server, ranking, read, write

from instructgpt_trl.data import InputError, load_rows

TASKS = [
    {
        "id": f"t{n}",
        "prompt": f"prompt {n}",
        "completions": [f"{n} {c}" for c in "abcd"],
        "models": ["w", "x", "y", "z"],
    }
    for n in range(6)
]


@pytest.fixture
def opened():
    """What is to be closed again, so that no test leaves a file or a lock open."""
    found: list = []
    yield lambda one: found.append(one) or one
    for one in found:
        one.close()


# The file

OWN = {"task": "t", "labeler_id": "ann"}


def test_a_row_is_there_once_and_comes_back(tmp_path, opened):
    log = Log(tmp_path / "new" / "log.jsonl")
    odd = {"id": "a", **OWN, "x": "\u2028 \U0001f600"}
    for row in (odd, {"id": "b", **OWN}, {"id": "a", **OWN, "x": "again"}):
        log.append(row)
    log.close()
    again = opened(Log(tmp_path / "new" / "log.jsonl"))
    assert again.rows == {"a": odd, "b": {"id": "b", **OWN}}
    again.remove("a")
    again.append({"id": "c", **OWN})
    assert [row["id"] for row in read(tmp_path / "new" / "log.jsonl")] == ["b", "c"]
    with pytest.raises(InputError, match="another server writes to it"):
        Log(tmp_path / "new" / "log.jsonl")


WHOLE = b'{"id": "a", "task": "t", "labeler_id": "ann"}'


@pytest.mark.parametrize("half", [b'{"id": "b", "te', b'{"id', b'{"id": "b", "task": "\xff'])
def test_half_a_row_at_the_end_goes_and_others_are_kept(tmp_path, opened, half):
    path = tmp_path / "log.jsonl"
    path.write_bytes(WHOLE + b"\n" + half)
    log = opened(Log(path))
    assert list(log.rows) == ["a"] and path.read_bytes() == WHOLE + b"\n"
    log.append({"id": "b", **OWN})
    assert [row["id"] for row in read(path)] == ["a", "b"]


def test_a_whole_row_without_a_newline_gets_one(tmp_path, opened):
    """As an editor leaves it."""
    path = tmp_path / "log.jsonl"
    path.write_bytes(WHOLE)
    log = opened(Log(path))
    log.append({"id": "b", **OWN})
    assert [row["id"] for row in read(path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": "a", "task": "t", "labeler_id": "l"}\n{\n', "row 2: not a row of this page"),
        ('{"prompt": "a"}\n', "row 1: not a row of this page"),
        ('{"prompt": "my only copy"}', "row 1: not a row of this page"),
        ("some text", "row 1: not a row of this page"),
        ('{"id": "a", "prompt": "p"}\n', "row 1: not a row of this page"),
        ('{"id": ["a"], "task": "t", "labeler_id": "l"}\n', "row 1: not a row of this page"),
        ('{"id": "a", "task": "t", "labeler_id": "l"}\n' * 2, "row 2: the id 'a' is there twice"),
    ],
)
def test_files_of_others_are_refused_and_left_alone(tmp_path, text, message):
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        Log(path)
    assert path.read_text() == text


def test_a_file_that_another_program_replaces_is_noticed(tmp_path, opened):
    """What is written to a file without a name is lost when the process ends."""
    log = opened(Log(tmp_path / "log.jsonl"))
    log.append({"id": "a", **OWN})
    (tmp_path / "other").write_bytes(log.path.read_bytes())
    (tmp_path / "other").replace(log.path)
    for change in (lambda: log.append({"id": "b", **OWN}), lambda: log.remove("a")):
        with pytest.raises(OSError, match="moved or changed by another program"):
            change()
    log.path.unlink()
    with pytest.raises(OSError, match="moved or changed"):
        log.append({"id": "b", **OWN})
    assert list(log.rows) == ["a"]


def test_rows_that_another_program_appends_are_not_lost(tmp_path, opened):
    log = opened(Log(tmp_path / "log.jsonl"))
    log.append({"id": "a", **OWN})
    with log.path.open("a") as file:
        file.write(json.dumps({"id": "theirs", **OWN}) + "\n")
    with pytest.raises(OSError, match="changed by another program"):
        log.remove("a")
    assert [row["id"] for row in read(log.path)] == ["a", "theirs"]


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch, opened):
    log = opened(Log(tmp_path / "log.jsonl"))
    log.append({"id": "a", **OWN})

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("labeling.log.os.fsync", full)
        patched.setattr(Log, "_cut", lambda self, end: self._file.truncate(end))
        with pytest.raises(OSError, match="No space"):
            log.append({"id": "b", **OWN})
    assert list(log.rows) == ["a"] and read(log.path) == [{"id": "a", **OWN}]
    log.append({"id": "b", **OWN})
    assert [row["id"] for row in read(log.path)] == ["a", "b"]


# Who is asked what


@pytest.fixture
def labels_of(tmp_path, opened):
    """`Labels` of some rows of tasks."""

    def make(rows=TASKS, overlap=0.0) -> Labels:
        return opened(Labels(TaskFile(write(tmp_path / "tasks.jsonl", rows)), tmp_path / "rankings.jsonl", overlap))

    return make


def answer(labels: Labels, labeler: str, ranks=(1, 2, 3, 4), name=None) -> str:
    task = labels.next(labeler)
    shown = label.shown(task, labeler)
    body = ranking(shown, labeler, name or f"{labeler}-{task.id}-id", list(ranks))
    labels.save("ranking", body["id"], labeler, task.id, task.version, body)
    return task.id


def test_two_at_once_get_different_tasks_and_each_is_done_once(tmp_path, labels_of):
    labels = labels_of()
    first, second = labels.next("ann"), labels.next("bob")
    assert first.id != second.id
    assert labels.next("ann").id == first.id  # held for her, a reload later too
    done = [answer(labels, labeler) for _ in range(3) for labeler in ("ann", "bob")]
    assert sorted(done) == [task["id"] for task in TASKS]
    assert labels.next("ann") is None and labels.next("eve") is None
    assert labels.progress("ann") | {"last": 0} == {
        "given": 6,
        "wanted": 6,
        "mine": 3,
        "last": 0,
        "agreement": {"pairs": 0, "share": None},
        "problem": None,
    }


def test_a_share_of_tasks_has_two_labelers_and_their_agreement(tmp_path, labels_of):
    rows = [{**TASKS[0], "id": f"n{n}"} for n in range(400)]
    labels = labels_of(rows, overlap=0.25)
    twice = sum(task.wants(0.25) == 2 for task in labels.tasks)
    assert 70 <= twice <= 130  # 100, give or take 3.5 standard errors
    labels.close()
    labels = labels_of(overlap=1.0)
    for labeler in ("ann", "bob"):
        assert [answer(labels, labeler) for _ in range(6)] == [task["id"] for task in TASKS]
        assert labels.next(labeler) is None  # nobody has the same task twice
    assert labels.progress("bob")["wanted"] == labels.progress("bob")["given"] == 12
    assert labels.progress("bob")["agreement"]["pairs"] == 36


def test_agreement_by_hand():
    """Ann: a > b > c. Bob: b = a > c. They agree on a > c and b > c, and one ties a and b."""
    given = [("t", [1, 2, 3]), ("t", [1, 1, 2]), ("u", [1, 2, 3])]
    rows = [{"task": task, "version": "v", "ranks": ranks} for task, ranks in given]
    assert agreement(rows) == {"pairs": 2, "share": 1.0}
    assert agreement([*rows, {"task": "u", "version": "v", "ranks": [3, 2, 1]}]) == {"pairs": 5, "share": 0.4}
    # Of other texts it is another task
    assert agreement([*rows, {"task": "u", "version": "w", "ranks": [2, 1]}]) == {"pairs": 2, "share": 1.0}


def test_answers_are_kept_in_the_order_of_the_task(tmp_path, labels_of):
    labels = labels_of()
    task = labels.next("ann")
    order = task.order("ann")
    assert sorted(order) == [0, 1, 2, 3]
    orders = {tuple(task.order(f"labeler {n}")) for n in range(200)}
    assert len(orders) == 24  # every one of them is shown to somebody
    body = ranking(label.shown(task, "ann"), "ann", "submission", [1, 2, 2, 5])
    labels.save("ranking", "submission", "ann", task.id, task.version, body)
    (row,) = load_rows(str(tmp_path / "rankings.jsonl"), "ranking")
    shown = [row["completions"][k] for k in row["order"]]
    assert shown == [task.completions[k] for k in order] == label.shown(task, "ann")["outputs"]
    assert [row["ranks"][k] for k in row["order"]] == [1, 2, 2, 3]  # no rank is left out
    assert [row["ratings"][k] for k in row["order"]] == [1, 2, 3, 4]
    assert row["completions"] == TASKS[0]["completions"] and row["models"] == TASKS[0]["models"]
    assert set(row["metadata"][0]) == set(QUESTIONS) and len(QUESTIONS) == 11


def test_skips_demonstrations_and_undo(tmp_path, labels_of):
    labels = labels_of(TASKS[:2])
    first = labels.next("ann")
    labels.save("skip", "skip-one", "ann", first.id, first.version, {"reason": "unclear"})
    assert labels.next("ann").id != first.id and labels.next("bob").id == first.id
    second = labels.next("ann")
    for name in ("demo-one", "demo-one"):
        labels.save("demonstration", name, "ann", second.id, second.version, {"text": "A good answer"})
    assert labels.next("ann").id == second.id  # it is still to be ranked
    with pytest.raises(Refused, match="answered this task already"):
        labels.save("demonstration", "demo-two", "ann", second.id, second.version, {"text": "Another"})
    answer(labels, "ann")
    (row,) = load_rows(str(tmp_path / "rankings.demonstrations.jsonl"), "demonstration")
    assert (row["prompt"], row["completion"], row["labeler_id"]) == (second.prompt, "A good answer", "ann")
    assert labels.next("ann") is None
    last = labels.progress("ann")["last"]
    labels.undo(last, "bob")  # nobody else's
    assert labels.answer(last, "bob") is None and labels.answer(last, "ann")["kind"] == "ranking"
    for _ in range(2):  # asked again, since the answer to the first did not arrive
        labels.undo(last, "ann")
    assert labels.answer(last, "ann") is None
    assert labels.next("ann").id == second.id and read(tmp_path / "rankings.jsonl") == []
    assert labels.answer("skip-one", "ann")["reason"] == "unclear"


def test_prompts_alone_ask_for_demonstrations(tmp_path, labels_of):
    labels = labels_of([{"prompt": [{"role": "user", "content": "hi"}]}])
    task = labels.next("ann")
    assert label.shown(task, "ann")["outputs"] == []
    labels.save("demonstration", "demo-one", "ann", task.id, task.version, {"text": "hello"})
    assert labels.next("ann") is None and labels.progress("ann")["given"] == 1
    (row,) = load_rows(str(tmp_path / "rankings.demonstrations.jsonl"), "demonstration")
    assert row["completion"] == [{"role": "assistant", "content": "hello"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "completions": ["a"]}, "K >= 2"),
        ({"prompt": "p", "completions": ["a"] * 10}, "10 completions; the page ranks 9"),
        ({"prompt": "p", "completions": ["a", 3]}, "completion 1: expected a string"),
        ({"completions": ["a", "b"]}, "column 'prompt' is missing"),
        ({"id": 1.5, "prompt": "p", "completions": ["a", "b"]}, "column 'id'"),
        ({"id": "t0", "prompt": "p", "completions": ["a", "b"]}, "the id 't0' is also that of .*row 1"),
        ({"prompt": "p", "completions": ["a", "\ud800"]}, "half a surrogate pair"),
        ({"prompt": "p", "completions": ["a", "b"], "models": ["x"]}, "column 'models'"),
        ({"prompt": [{"role": "user", "content": "p"}], "completions": ["a", "b"]}, "texts in one row and conv"),
        ([], "expected an object"),
    ],
)
def test_wrong_tasks_are_named(tmp_path, row, message):
    path = write(tmp_path / "tasks.jsonl", [TASKS[0], row])
    with pytest.raises(InputError, match=f"row 2.*{message}"):
        read_tasks(path)


def test_tasks_that_change_while_people_work(tmp_path, labels_of):
    labels = labels_of(TASKS[:2])
    task = labels.next("ann")
    body = ranking(label.shown(task, "ann"), "ann", "submission")
    changed = {**TASKS[0], "completions": ["new", "texts"], "models": ["x", "y"]}
    write(tmp_path / "tasks.jsonl", [changed, *TASKS[2:]])
    assert labels.next("bob").completions == ("new", "texts")  # another task than hers
    labels.save("ranking", body["id"], "ann", task.id, task.version, body)  # of what she was shown
    assert read(tmp_path / "rankings.jsonl")[0]["completions"] == TASKS[0]["completions"]
    assert labels.shown("t0", task.version, "ann").completions == tuple(TASKS[0]["completions"])  # for an undo
    (tmp_path / "tasks.jsonl").write_text("{")
    assert labels.next("bob") is not None
    assert "has changed and cannot be read" in labels.progress("bob")["problem"]
    write(tmp_path / "tasks.jsonl", TASKS)
    labels.next("bob")
    assert labels.progress("bob")["problem"] is None
    with pytest.raises(Refused, match="not shown this task"):
        labels.save("ranking", "another-one", "bob", "t1", "no such version", body)


def test_a_restart_remembers_who_was_shown_what(tmp_path, labels_of):
    """Nobody gets another's task, and it can be answered though its texts have changed since."""
    labels = labels_of(TASKS[:2])
    first = labels.next("ann")
    body = ranking(label.shown(first, "ann"), "ann", "submission")
    labels.close()
    again = labels_of([{**TASKS[0], "completions": ["new", "texts"], "models": ["x", "y"]}, TASKS[1]])
    again.save("ranking", body["id"], "ann", first.id, first.version, body)
    assert read(tmp_path / "rankings.jsonl")[0]["completions"] == TASKS[0]["completions"]
    second = again.next("ann")
    assert second.completions == ("new", "texts")
    again.close()
    third = labels_of([{**TASKS[0], "completions": ["new", "texts"], "models": ["x", "y"]}, TASKS[1]])
    assert third.next("bob").id == "t1" and third.next("ann") == second


def test_as_many_labelers_as_a_task_wants(labels_of):
    labels = labels_of(TASKS[:1], overlap=1.0)
    assert [labels.next(name) is not None for name in ("ann", "bob", "eve", "dan", "ann")] == [
        *(True, True, False, False),
        True,
    ]


def test_half_a_character_is_refused(labels_of):
    labels = labels_of(TASKS[:1])
    task = labels.next("ann")
    with pytest.raises(Refused, match="half a surrogate pair"):
        labels.save("skip", "skip-one", "ann", task.id, task.version, {"reason": "\ud800"})
    assert labels.logs["skip"].rows == {}


def test_tasks_from_a_table(tmp_path):
    (tmp_path / "tasks.csv").write_text('prompt,completions\np,"[""a"", ""b""]"\n')
    (task,) = read_tasks(tmp_path / "tasks.csv").values()
    assert task.completions == ("a", "b")
    (tmp_path / "tasks.csv").write_text("prompt,completions\np,a and b\n")
    with pytest.raises(InputError, match="row 1, column 'completions': not valid JSON"):
        read_tasks(tmp_path / "tasks.csv")


# The server


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    with Server(write(folder / "tasks.jsonl", TASKS), folder / "rankings.jsonl", "--overlap", "0") as one:
        one.folder = folder
        yield one


def test_what_the_page_gets_has_no_names_of_models(server):
    status, answer = server.ask("/api/next?labeler=ann")
    assert status == 200 and set(answer["task"]) == {"id", "version", "prompt", "outputs"}
    assert not any(name in json.dumps(answer["task"]) for name in ("models", '"w"', '"x"'))
    assert server.ask("/api/questions") == (200, QUESTIONS)
    for name in ("/", "/page.js", "/page.css"):
        assert server.ask(name)[0] == 200
    assert server.ask("/labels.py")[0] == 404


def test_nonsense_is_refused_and_nothing_is_written(server):
    task = server.ask("/api/next?labeler=ann")[1]["task"]
    good = ranking(task, "ann", "submission-1")
    before = read(server.folder / "rankings.jsonl")
    for change in (
        {"ranks": [1, 2]},
        {"ranks": [0, 1, 2, 3]},
        {"ranks": [1, 2, 3, "x"]},
        {"ratings": [8, 1, 1, 1]},
        {"metadata": [{}] * 4},
        {"metadata": [{name: "yes" * 9 for name in QUESTIONS}] * 4},
        {"version": "other"},
        {"task": "../../etc/passwd"},
        {"labeler": " "},
        {"id": "x"},
        {"seconds": -1},
        {"seconds": float("inf")},
        {"labeler": "\ud800"},
    ):
        status, answer = server.ask("/api/ranking", {**good, **change})
        assert status in (409, 422) and answer["detail"], change
    assert server.ask("/api/ranking", [])[0] == 422
    assert server.ask("/api/skip", {**good, "reason": " "})[0] == 409
    assert server.ask("/api/demonstration", {**good, "text": " "})[0] == 409
    assert read(server.folder / "rankings.jsonl") == before


def test_other_hosts_and_forms_of_other_pages_are_refused(server):
    assert server.ask("/api/questions", headers={"Host": "evil.example"})[0] == 403
    task = server.ask("/api/next?labeler=ann")[1]["task"]
    body = ranking(task, "ann", "from-elsewhere")
    assert server.ask("/api/ranking", body, {"Content-Type": "text/plain"})[0] == 422
    for site in ("cross-site", "same-site"):  # which would hold tasks
        assert server.ask("/api/next?labeler=eve", headers={"Sec-Fetch-Site": site})[0] == 403
        assert server.ask("/", headers={"Sec-Fetch-Site": site})[0] == 200  # a link to the page


def test_a_column_of_a_task_changes_no_answer(labels_of):
    labels = labels_of([{**TASKS[0], "kind": "qa", "time": "never", "ranks": [9]}])
    answer(labels, "ann", name="the-answer")
    assert labels.answer("the-answer", "ann")["kind"] == "ranking"
    labels.undo("the-answer", "ann")
    assert labels.progress("ann")["mine"] == 0


def test_a_reload_goes_on_with_the_task_that_was_shown(labels_of):
    labels = labels_of()
    first, second = labels.next("ann"), labels.next("bob")
    labels.save("skip", "skipped-by-ann", "ann", first.id, first.version, {"reason": "no"})
    assert labels.next("bob").id == second.id


def test_names_with_spaces_are_told_apart(labels_of):
    rows = [{"id": name, "prompt": "p", "completions": ["x", "y"], "models": [name, name]} for name in ("a", "a b")]
    labels = labels_of(rows, overlap=1.0)
    for labeler in ("c", "b c"):
        for _ in rows:
            answer(labels, labeler, ranks=(1, 2))
    assert all(set(row["models"]) == {row["task"]} for row in labels.logs["ranking"].rows.values())


def test_extra_columns_of_several_types_are_read_back(tmp_path, labels_of):
    labels = labels_of([{**TASKS[0], "score": 1}, {**TASKS[1], "score": "high"}])
    for _ in range(2):
        answer(labels, "ann")
    rows = load_rows(str(tmp_path / "rankings.jsonl"), "ranking")
    assert rows["score"] == ["1", "high"] and rows["completions"][0] == TASKS[0]["completions"]


def test_long_and_odd_texts_come_back_as_they_were(tmp_path):
    texts = [
        "x" * 100_000,
        "\u202eabc\u202c \U0001f469\u200d\U0001f4bb\x00\x07",
        "</script><img src=x onerror=alert(1)>",
        "",
    ]
    tasks = write(tmp_path / "tasks.jsonl", [{"prompt": "\u2028p\x85", "completions": texts}])
    with Server(tasks, tmp_path / "rankings.jsonl") as one:
        task = one.ask("/api/next?labeler=%F0%9F%98%80")[1]["task"]
        assert sorted(task["outputs"]) == sorted(texts) and task["prompt"] == "\u2028p\x85"
        assert one.ask("/api/ranking", ranking(task, "\U0001f600", "submission"))[0] == 200
    (row,) = load_rows(str(tmp_path / "rankings.jsonl"), "ranking", allow_empty=True)
    assert row["completions"] == texts and row["labeler_id"] == "\U0001f600"


def test_a_token_is_wanted_elsewhere_than_on_this_machine(tmp_path):
    tasks = write(tmp_path / "tasks.jsonl", TASKS)
    with Server(tasks, tmp_path / "rankings.jsonl", "--host", "0.0.0.0", "--token", "secret") as one:
        assert one.ask("/")[0] == 401 and one.ask("/?token=wrong")[0] == 401
        assert one.ask("/?token=secret")[0] == 200
        assert one.ask("/api/questions", headers={"Cookie": f"{label.COOKIE}=secret"})[0] == 200
    assert label.is_loopback("127.0.0.1") and label.is_loopback("::1") and not label.is_loopback("0.0.0.0")


def with_room(command: list[str], size: int) -> list[str]:
    """The command in a process that writes no file of more bytes."""
    limit = "import resource, signal, runpy, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size})); sys.argv = sys.argv[1:]; "
    limit += "sys.path.insert(0, sys.argv[0].rsplit('/', 1)[0]); runpy.run_path(sys.argv[0], run_name='__main__')"
    return [command[0], "-c", limit, *command[1:]]


def test_no_room_to_keep_what_is_shown(tmp_path):
    one = Server(write(tmp_path / "tasks.jsonl", TASKS), tmp_path / "rankings.jsonl")
    one.command = with_room(one.command, 100)
    with one:
        status, said = one.ask("/api/next?labeler=ann")
    assert status == 507 and "no task could be given: File too large" in said["detail"]


def test_a_full_disk_is_said_and_mended(tmp_path):
    """A real one: the file may not grow beyond a limit of its process."""
    tasks = write(tmp_path / "tasks.jsonl", TASKS)
    one = Server(tasks, tmp_path / "rankings.jsonl")
    command = one.command
    one.command = with_room(command, 2500)
    statuses = []
    with one:
        for n in range(3):
            task = one.ask(f"/api/next?labeler=l{n}")[1]["task"]
            status, answer = one.ask("/api/ranking", ranking(task, f"l{n}", f"submission-{n}"))
            statuses.append(status)
    assert statuses == [200, 507, 507] and "not saved" in answer["detail"]
    assert [row["id"] for row in read(tmp_path / "rankings.jsonl")] == ["submission-0"]
    one.command = command
    with one:  # with room again the same submission is taken
        task = one.ask("/api/next?labeler=l2")[1]["task"]
        assert one.ask("/api/ranking", ranking(task, "l2", "submission-2"))[0] == 200
    assert [row["id"] for row in read(tmp_path / "rankings.jsonl")] == ["submission-0", "submission-2"]


def submit(server: Server, labeler: str, name: str, confirmed: list[str]) -> None:
    """As the page does: again and again under the same id until the server has said that it is saved."""
    while True:
        try:
            task = server.ask(f"/api/next?labeler={labeler}")[1]["task"]
            if task is None:
                return
            body = ranking(task, labeler, name)
            while server.ask("/api/ranking", body)[0] != 200:
                time.sleep(0.02)
            confirmed.append(name)
            return
        except (OSError, urllib.error.URLError, HTTPException):
            time.sleep(0.05)


def submit_all(server: Server, labelers: list[str], each: int) -> tuple[list[threading.Thread], list[str]]:
    confirmed: list[str] = []

    def work(labeler: str) -> None:
        for n in range(each):
            submit(server, labeler, f"{labeler}-{n:06d}", confirmed)

    threads = [threading.Thread(target=work, args=(labeler,)) for labeler in labelers]
    for thread in threads:
        thread.start()
    return threads, confirmed


def test_200_submissions_at_once_are_all_there_once(tmp_path):
    rows = [{**TASKS[0], "id": f"n{n}"} for n in range(200)]
    with Server(write(tmp_path / "tasks.jsonl", rows), tmp_path / "rankings.jsonl", "--overlap", "0") as one:
        threads, confirmed = submit_all(one, [f"labeler{n}" for n in range(200)], 1)
        for thread in threads:
            thread.join()
    found = read(tmp_path / "rankings.jsonl")
    assert (
        len(confirmed) == 200 == len(found) == len({row["id"] for row in found}) == len({row["task"] for row in found})
    )
    assert {row["id"] for row in found} == set(confirmed)


def test_20_kills_lose_nothing_and_double_nothing(tmp_path):
    rng = random.Random(0)
    rows = [{**TASKS[0], "id": f"n{n}"} for n in range(400)]
    one = Server(write(tmp_path / "tasks.jsonl", rows), tmp_path / "rankings.jsonl", "--overlap", "0").start()
    threads, confirmed = submit_all(one, [f"labeler{n}" for n in range(8)], 50)
    kills = 0
    while kills < 20:
        goal = len(confirmed) + rng.randint(3, 15)
        while len(confirmed) < goal and len(confirmed) < 400:
            time.sleep(0.005)
        assert len(confirmed) < 400, "all was sent before the last kill"
        time.sleep(rng.random() * 0.02)
        one.kill()
        kills += 1
        before = {row["id"] for row in read_whole(tmp_path / "rankings.jsonl")}
        assert set(confirmed) <= before  # what was said to be saved is on disk
        one.start()
    for thread in threads:
        thread.join()
    one.kill()
    found = read(tmp_path / "rankings.jsonl")
    assert sorted(row["id"] for row in found) == sorted(confirmed) and len(confirmed) == 400
    assert len({row["task"] for row in found}) == 400  # nobody has done what another was at
    assert len(load_rows(str(tmp_path / "rankings.jsonl"), "ranking")) == 400


def read_whole(path) -> list[dict]:
    """Rows of a file whose last line may be half a one."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1] if line]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "x.csv"], "a name that ends with .jsonl"),
        (["--overlap", "2"], "--overlap 2.0"),
        (["--token", "a&b"], "--token: expected letters"),
        (["--port", "99999"], "invalid choice"),
        (["--tasks", "nowhere.jsonl"], "no such file"),
    ],
)
def test_wrong_settings(tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "tasks.jsonl", TASKS)
    with pytest.raises(SystemExit):
        label.main(["--tasks", "tasks.jsonl", "--output", "rankings.jsonl", *flags])
    assert message in capsys.readouterr().err
