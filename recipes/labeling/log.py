"""A file of JSON Lines that is on disk before anybody is told so, and whole whenever the process is killed."""

import fcntl
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from instructgpt_trl.data import InputError

Row = dict[str, Any]
NEEDED = ("id", "task", "labeler_id")  # columns with a text in every row
BEGIN = b'{"id": '  # of every row as it is written here


class Log:
    """
    Rows by their `id`, in a file of JSON Lines: what is appended or removed has reached the disk when the call
    returns, and an id is there once, however often it is appended. A process that is killed leaves whole rows, or at
    the end half a one, which was never confirmed and goes when the file is opened again.

    Args:
        path (`Path`): The file; is made if it is not there.

    Raises:
        [`InputError`]: a line of the file is none of ours, or two have one id, or another process has the file open.
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
        *lines, tail = data.split(b"\n")
        for number, line in enumerate(lines, start=1):
            if line.strip():
                self._keep(line, number)
        if tail:
            self._end(tail, len(data) - len(tail), len(lines) + 1)
        if new:
            _sync_folder(self.path.parent)
        self._size = os.fstat(self._file.fileno()).st_size

    def _end(self, tail: bytes, start: int, number: int) -> None:
        """What is behind the last newline: a whole row gets one, half a one of ours goes, and others are refused."""
        try:
            json.loads(tail)
        except ValueError:
            if not (tail.startswith(BEGIN) or BEGIN.startswith(tail)):
                raise InputError(f"{self.path}, row {number}: not a row of this page; choose another file") from None
            self._cut(start)
            return
        self._keep(tail, number)
        self._file.write(b"\n")
        self._flush()

    def _keep(self, line: bytes, number: int) -> None:
        where = f"{self.path}, row {number}"
        try:
            row = json.loads(line)
            good = all(isinstance(row[name], str) for name in NEEDED)
        except (ValueError, KeyError, TypeError, RecursionError):
            good = False
        if not good:
            raise InputError(
                f"{where}: not a row of this page, which has texts {', '.join(NEEDED)}; choose another file, or "
                f"correct it"
            )
        if row["id"] in self.rows:
            raise InputError(f"{where}: the id {row['id']!r} is there twice; take one of them out")
        self.rows[row["id"]] = row

    def append(self, row: Row) -> None:
        """
        Add a row, unless its id is there.

        Raises:
            `OSError`: it could not be written, as on a full disk, or another program has put another file in the place
                of this one; the file is as it was.
        """
        if row["id"] in self.rows:
            return
        self._check_place()
        end = os.fstat(self._file.fileno()).st_size
        try:
            self._file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
            self._flush()
        except OSError:
            self._reopen()
            self._cut(end)
            raise
        self.rows[row["id"]] = row
        self._size = os.fstat(self._file.fileno()).st_size

    def remove(self, name: str) -> None:
        """
        Take a row out: the file is written anew beside itself and takes its own name.

        Raises:
            `OSError`: as in `append`.
        """
        self._check_place()
        kept = {key: row for key, row in self.rows.items() if key != name}
        with tempfile.NamedTemporaryFile(dir=self.path.parent, prefix=".unfinished-", delete=False) as file:
            try:
                file.writelines((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in kept.values())
                file.flush()
                os.fsync(file.fileno())
                os.chmod(file.name, self.path.stat().st_mode)
                os.replace(file.name, self.path)
            except BaseException:
                os.unlink(file.name)
                raise
        self.rows = kept
        self._reopen()
        self._size = os.fstat(self._file.fileno()).st_size
        _sync_folder(self.path.parent)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._lock.close()

    def _check_place(self) -> None:
        """
        An editor that saves, or `mv`, leaves this process with a file that has no name any more; and rows that another
        program wrote are not among those that `remove` writes anew.
        """
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            there = None
        if there is None or there.st_ino != os.fstat(self._file.fileno()).st_ino or there.st_size != self._size:
            raise OSError(f"{self.path} was moved or changed by another program; start the server again")

    def _flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

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
