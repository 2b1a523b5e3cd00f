"""Asking a web service, with patience."""

import json
import time
import urllib.error
import urllib.request
from typing import Any

WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each further try


def post(url: str, body: dict[str, Any], headers: dict[str, str] | None = None, timeout: float = 120) -> Any:
    """
    The JSON answer to a JSON request; tried again where the service is busy (429, 5xx) or cannot be reached.

    Raises:
        `OSError`: there was no answer, or one that says what is wrong.
    """
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})})
    for wait in (*WAITS, None):
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            error.close()
            if wait is None or error.code != 429 and error.code < 500:
                raise
        except OSError:
            if wait is None:
                raise
        time.sleep(wait)
    raise AssertionError
