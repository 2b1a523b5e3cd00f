"""A file of JSON Lines that is on disk before anybody is told so, and whole whenever the process is killed."""

import fcntl
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from instructgpt_trl.data import InputError

Row = dict[str, Any]


class Log:
    """
    Rows by their `id`, in a file of JSON Lines: what is appended or removed has reached the disk when the call
    returns, and an id is there once, however often it is appended. A process that is killed leaves whole rows, or at
    the end half a one, which was never confirmed and goes when the file is opened again.

    Args:
        path (`Path`): The file; is made if it is not there.

    Raises:
        [`InputError`]: a whole line of the file is no row with an `id`, or two have the same, or another process has
        the file open.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        # A lock of the process: it ends with it, however it ends
        self._lock = path.with_name(f".{path.name}.lock").open("w")
        self._file = None
        self.rows: dict[str, Row] = {}
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._open()
        except BlockingIOError:
            self.close()
            raise InputError(f"{path}: another server writes to it; stop that one or choose another file") from None
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        new = not self.path.exists()
        self._file = self.path.open("ab+")
        self._file.seek(0)
        data = self._file.read()
        end = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:end].split(b"\n")[:-1], start=1):
            if line.strip():
                self._keep(line, number)
        if end < len(data):
            self._cut(end)
        if new:
            _sync_folder(self.path.parent)

    def _keep(self, line: bytes, number: int) -> None:
        where = f"{self.path}, row {number}"
        try:
            row = json.loads(line)
            name = row["id"]
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{where}: not a row of this page, which has an 'id'; choose another file, or correct it"
            ) from None
        if name in self.rows:
            raise InputError(f"{where}: the id {name!r} is there twice; take one of them out")
        self.rows[name] = row

    def append(self, row: Row) -> None:
        """
        Add a row, unless its id is there.

        Raises:
            `OSError`: it could not be written, as on a full disk; the file is as it was.
        """
        if row["id"] in self.rows:
            return
        end = os.fstat(self._file.fileno()).st_size
        try:
            self._file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError:
            self._reopen()
            self._cut(end)
            raise
        self.rows[row["id"]] = row

    def remove(self, name: str) -> None:
        """Take a row out: the file is written anew beside itself and takes its own name."""
        kept = [row for row in self.rows.values() if row["id"] != name]
        with tempfile.NamedTemporaryFile(dir=self.path.parent, prefix=".unfinished-", delete=False) as file:
            try:
                file.writelines((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in kept)
                file.flush()
                os.fsync(file.fileno())
                os.chmod(file.name, self.path.stat().st_mode)
                os.replace(file.name, self.path)
            except BaseException:
                os.unlink(file.name)
                raise
        _sync_folder(self.path.parent)
        del self.rows[name]
        self._reopen()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._lock.close()

    def _reopen(self) -> None:
        try:
            self._file.close()
        except OSError:  # a full disk again: what was buffered is given up
            pass
        self._file = self.path.open("ab+")

    def _cut(self, end: int) -> None:
        self._file.truncate(end)
        os.fsync(self._file.fileno())


def _sync_folder(folder: Path) -> None:
    """So that a new name is on disk too."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
