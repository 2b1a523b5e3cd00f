"""Asking a web service, with patience."""

from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

# Waits 0, 2, 4 and 8 seconds, or what the service asks for
AGAIN = Retry(total=4, backoff_factor=1, status_forcelist=[429, 500, 502, 503, 504], allowed_methods=None)


def post(url: str, body: dict[str, Any], headers: dict[str, str] | None = None, timeout: float = 120) -> Any:
    """
    The JSON answer to a JSON request; asked again where the service is busy (429, 5xx) or cannot be reached.

    Raises:
        `OSError`: there was no answer, or one that says what is wrong.
    """
    with requests.Session() as session:
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=AGAIN))
        response = session.post(url, json=body, headers=headers, timeout=timeout)
        response.raise_for_status()
        return response.json()
