r"""
A page on which people rank completions, rate them and write demonstrations, on this machine alone.

    python recipes/label.py --tasks tasks.jsonl --output rankings.jsonl

Open the address it prints in a browser; several people may, each with a name. A task is a row with `prompt` and
`completions`, 2 to 9 of them, as recipes/collect.py writes it, or with a `prompt` alone, which asks for a
demonstration. Who wrote a completion is not shown, and each labeler sees them in another order. First every output is
rated from 1 to 7 and asked the paper's eleven questions, then all are ranked, ties allowed [InstructGPT 3.4, B.2].

What is sent is on disk before the page says so. Rankings go straight into recipes/reward.py and eval/agreement.py;
demonstrations, for recipes/sft.py, skipped tasks and what was shown to whom stand in files beside them. It listens on
this machine only; `--host` with another address wants a token, which is made if none is given.
"""

import argparse
import ipaddress
import re
import secrets
import socket
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import Body, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from labeling.labels import QUESTIONS, Labels, Refused
from labeling.tasks import Task, TaskFile
from pydantic import BaseModel, Field, StringConstraints

from instructgpt_trl.data import InputError, check_output_dir

PAGE = Path(__file__).with_name("labeling")
FILES = ("page.html", "page.css", "page.js")
COOKIE = "labeling_token"
# Nothing from elsewhere, and no script in a text
POLICY = "default-src 'self'; img-src data:; frame-ancestors 'none'; form-action 'none'; base-uri 'none'"
Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=100)]


class Answer(BaseModel):
    """What every kind of answer says. `id` is made by the page and stays the same if it has to send it again."""

    id: Annotated[str, StringConstraints(min_length=8, max_length=64)]
    labeler: Name
    task: str
    version: str


class Ranking(Answer):
    """`ranks`, `ratings` and `metadata` one an output, in the order in which they were shown."""

    ranks: list[Annotated[int, Field(ge=1)]]
    ratings: list[Annotated[int, Field(ge=1, le=7)]]
    metadata: list[dict[str, bool]]
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


class Demonstration(Answer):
    text: str


class Skip(Answer):
    reason: Annotated[str, StringConstraints(max_length=2000)]


class Undo(BaseModel):
    id: str
    labeler: Name


def shown(task: Task, labeler: str) -> dict[str, Any]:
    """What the page gets of a task: no model names, the completions in this labeler's order."""
    completions = [task.completions[k] for k in task.order(labeler)]
    return {"id": task.id, "version": task.version, "prompt": task.prompt, "outputs": completions}


def make_app(labels: Labels, token: str | None, hosts: set[str]) -> FastAPI:
    """The page and what it asks. With a `token` every request has to have it; `hosts` are the names it answers to."""

    @asynccontextmanager
    async def life(app: FastAPI):
        yield
        labels.close()

    app = FastAPI(title="Labelling", lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def guard(request: Request, call_next):
        if token is None and request.url.hostname not in hosts:  # a page from elsewhere with a name for this machine
            return JSONResponse({"detail": f"unknown host {request.url.hostname}"}, status_code=403)
        if request.url.path != "/" and request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return JSONResponse({"detail": "asked by a page from elsewhere"}, status_code=403)
        given = request.query_params.get("token") or request.cookies.get(COOKIE) or ""
        if token is not None and not secrets.compare_digest(given.encode(), token.encode()):
            return JSONResponse(
                {"detail": "open the address with ?token=..., as the server printed it"}, status_code=401
            )
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Cache-Control"] = "no-store"
        if token is not None and "token" in request.query_params:
            response.set_cookie(COOKIE, token, httponly=True, samesite="strict")
        return response

    @app.get("/")
    def page() -> FileResponse:
        return FileResponse(PAGE / FILES[0])

    for name in FILES[1:]:
        app.get(f"/{name}")(lambda name=name: FileResponse(PAGE / name))

    @app.get("/api/questions")
    def questions() -> dict[str, str]:
        return QUESTIONS

    @app.get("/api/next")
    def next_task(labeler: Name) -> dict[str, Any]:
        try:
            task = labels.next(labeler)
        except OSError as error:  # what is shown is kept
            raise HTTPException(507, f"no task could be given: {error.strerror or error}; asking again") from None
        return {"task": task and shown(task, labeler), "progress": labels.progress(labeler)}

    def save(kind: str, answer: Answer) -> dict[str, Any]:
        try:
            labels.save(kind, answer.id, answer.labeler, answer.task, answer.version, answer.model_dump())
        except Refused as error:
            raise HTTPException(409, str(error)) from None
        except OSError as error:
            raise HTTPException(507, f"not saved: {error.strerror or error}; it will be sent again") from None
        return {"saved": answer.id}

    @app.post("/api/ranking")
    def ranking(answer: Annotated[Ranking, Body()]) -> dict[str, Any]:
        if any(set(one) != set(QUESTIONS) for one in answer.metadata):
            raise HTTPException(409, f"expected an answer to each of {', '.join(QUESTIONS)}")
        return save("ranking", answer)

    @app.post("/api/demonstration")
    def demonstration(answer: Annotated[Demonstration, Body()]) -> dict[str, Any]:
        return save("demonstration", answer)

    @app.post("/api/skip")
    def skip(answer: Annotated[Skip, Body()]) -> dict[str, Any]:
        return save("skip", answer)

    @app.get("/api/answer")
    def answer_of(id: str, labeler: Name) -> dict[str, Any]:
        """An answer and its task, which the page keeps before it has the answer taken out."""
        row = labels.answer(id, labeler)
        task = row and labels.shown(row["task"], row["version"], labeler)
        return {"answer": row and given(row), "task": task and shown(task, labeler)}

    @app.exception_handler(RequestValidationError)
    def wrong(request: Request, error: RequestValidationError) -> JSONResponse:
        """Where and why, without what was sent, which may be no text."""
        said = "; ".join(f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in error.errors())
        return JSONResponse({"detail": said.encode("utf-8", "replace").decode()}, status_code=422)

    @app.post("/api/undo")
    def undo(what: Annotated[Undo, Body()]) -> dict[str, Any]:
        try:
            labels.undo(what.id, what.labeler)
        except OSError as error:
            raise HTTPException(507, f"not undone: {error.strerror or error}") from None
        return {"progress": labels.progress(what.labeler)}

    return app


def given(row: dict[str, Any]) -> dict[str, Any]:
    """What the page needs to show an answer again: of a ranking the values in the order that was shown."""
    out = {name: row[name] for name in ("kind", "task", "reason") if name in row}
    if row["kind"] == "demonstration":
        text = row["completion"]
        out["text"] = text if isinstance(text, str) else text[0]["content"]
    if row["kind"] == "ranking":
        out |= {name: [row[name][k] for k in row["order"]] for name in ("ranks", "ratings", "metadata")}
    return out


def last_text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", required=True, type=Path, help="rows with prompt and completions, or prompt alone")
    parser.add_argument("--output", required=True, type=Path, help="JSON Lines of rankings; is added to")
    parser.add_argument("--overlap", type=float, default=0.1, help="share of tasks that two labelers rank")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, choices=range(1, 65536), metavar="PORT", default=8765)
    parser.add_argument("--token", help="with another --host: what browsers have to bring; made if not given")
    return parser.parse_args(argv)


def _check_address(host: str, port: int) -> None:
    """Raise [`InputError`] if nobody can listen there; uvicorn says so when the address has been printed."""
    if not host.strip():
        raise InputError("--host: expected an address; give one, 0.0.0.0 for all of this machine")
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: {error.strerror or error}; choose another") from None


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    try:
        if args.output.suffix != ".jsonl":
            raise InputError(f"--output {args.output}: expected a name that ends with .jsonl")
        if not 0 <= args.overlap <= 1:
            raise InputError(f"--overlap {args.overlap}: expected a share from 0 to 1")
        if args.token is not None and not re.fullmatch(r"[\w.~-]+", args.token, re.ASCII):
            raise InputError("--token: expected letters, digits, and . _ ~ - alone, since it stands in an address")
        if args.output.resolve() == args.tasks.resolve():
            raise InputError(f"--output {args.output}: is the file of tasks; choose another")
        check_output_dir(args.output.parent)
        _check_address(args.host, args.port)
        tasks = TaskFile(args.tasks)
        labels = Labels(tasks, args.output, args.overlap)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if silent := sum(any(not last_text(one).strip() for one in task.completions) for task in tasks):
        print(
            f"{silent} tasks have a completion of no text, which recipes/reward.py refuses and people can rank; "
            f"recipes/data/convert_rankings.py --drop_empty leaves it out afterwards",
            flush=True,
        )
    token = args.token or (None if is_loopback(args.host) else secrets.token_urlsafe(16))
    app = make_app(labels, token, {args.host, "127.0.0.1", "localhost", "::1", "[::1]"})
    host = f"[{args.host}]" if ":" in args.host else args.host
    query = f"/?token={token}" if token else "/"
    print(f"label at http://{host}:{args.port}{query}  (Ctrl-C ends it; nothing is lost)", flush=True)
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
