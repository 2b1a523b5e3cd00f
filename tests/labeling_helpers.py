"""A labelling server in a process of its own, and what a browser sends to it."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from labeling.labels import QUESTIONS

SCRIPT = Path(__file__).parents[1] / "recipes" / "label.py"


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line] if path.exists() else []


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Server:
    """`python recipes/label.py` on a free port; killed (-9) by `kill`, and started again by `start`."""

    def __init__(self, tasks: Path, output: Path, *flags: str):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [sys.executable, str(SCRIPT), "--tasks", str(tasks), "--output", str(output)]
        self.command += ["--port", str(self.port), *flags]
        self.process: subprocess.Popen | None = None

    def start(self) -> "Server":
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(600):
            if self.process.poll() is not None:
                raise RuntimeError(self.process.stdout.read())
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return self
            except OSError:
                time.sleep(0.05)
        raise RuntimeError("the server did not start")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def __enter__(self) -> "Server":
        return self.start()

    def __exit__(self, *_: Any) -> None:
        self.kill()

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """Status and answer."""
        data = None if body is None else json.dumps(body).encode()
        headers = {**({"Content-Type": "application/json"} if data else {}), **(headers or {})}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self.url + path, data, headers), timeout=10
            ) as response:
                text = response.read().decode()
                return response.status, json.loads(text) if text.startswith(("{", "[")) else text
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read().decode())


def ranking(task: dict, labeler: str, name: str, ranks: list[int] | None = None) -> dict[str, Any]:
    """What the page sends for a task that it was shown."""
    k = len(task["outputs"])
    return {
        "id": name,
        "labeler": labeler,
        "task": task["id"],
        "version": task["version"],
        "ranks": ranks or list(range(1, k + 1)),
        "ratings": [1 + n % 7 for n in range(k)],
        "metadata": [dict.fromkeys(QUESTIONS, False) for _ in range(k)],
        "seconds": 1.5,
    }
