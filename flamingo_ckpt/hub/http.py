"""Requests to the hub that are answered with JSON, or with a range of a file.

The connection is `huggingface_hub`'s own, with its proxies and certificates. What this adds: a
redirect is followed here, so that the token goes to the endpoint and to nobody else; bytes and
requests are counted; what may pass (a status 429 or 503, a broken connection) is tried again, and
a server that asks for more patience than `_MAX_WAIT_SECONDS` is told of instead.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

from flamingo_ckpt.hub import failures
from flamingo_ckpt.hub.failures import Ask
from flamingo_ckpt.hub.names import PUBLIC_ENDPOINT, endpoint, is_offline

# Between the tries of one request.
_WAITS = (0.5, 1.0, 2.0, 4.0)
_MAX_WAIT_SECONDS = 30.0
_TIMEOUT_SECONDS = 30.0
_MAX_REDIRECTS = 5
_MAX_JSON_BYTES = 64 << 20
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_REDIRECTS = (301, 302, 303, 307, 308)

_T = TypeVar("_T")


class Again(Exception):  # noqa: N818 - it is caught on purpose, and is no error unless it stays
    """Something that may pass when it is tried again.

    Args:
        reason: for the message, should it not pass.
        seconds: that the server asks to wait.
    """

    def __init__(self, reason: str, seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.seconds = seconds


class Meter:
    """How much was moved; threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.num_bytes = 0
        self.num_requests = 0

    def add(self, *, num_bytes: int = 0, num_requests: int = 0) -> None:
        """Count."""
        with self._lock:
            self.num_bytes += num_bytes
            self.num_requests += num_requests


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer whose body is still to be read.

    Attributes:
        status: of HTTP.
        headers: of the answer itself, names in lower case.
        told: headers of the endpoint, which may have sent us on to a store of large files.
        url: where it came from.
        chunks: the body as it arrives, not decoded; counted.
    """

    status: int
    headers: Mapping[str, str]
    told: Mapping[str, str]
    url: str
    chunks: Iterator[bytes]


class Http:
    """One conversation with the endpoint.

    Args:
        token: of the login by default; False sends none.
    """

    def __init__(self, token: str | bool | None = None) -> None:
        self.endpoint = endpoint() or PUBLIC_ENDPOINT
        self.meter = Meter()
        self._token = token
        self._own_headers: dict[str, str] | None = None

    def get_json(self, path: str, ask: Ask) -> tuple[Any, Mapping[str, str]]:
        """(document, headers) of a call below `/api`.

        Args:
            path: below the endpoint, with its query.
            ask: for messages.

        Raises:
            CkptError: FC470 to FC474, and FC476 for an answer that is no JSON.
        """
        url = f"{self.endpoint}/{path}"

        def attempt() -> tuple[Any, Mapping[str, str]]:
            with self.get(url, {}, ask) as answer:
                self.check_status(answer, ask, (200,))
                body = bytearray()
                for chunk in answer.chunks:
                    body += chunk
                    if len(body) > _MAX_JSON_BYTES:
                        raise failures.bad_answer(ask, "the list of files is endless")
                return body, answer.headers

        body, headers = self.persistently(attempt, ask)
        try:
            return json.loads(body), headers
        except (ValueError, RecursionError):
            raise failures.bad_answer(ask, "it is not JSON") from None

    @contextmanager
    def get(self, url: str, headers: Mapping[str, str], ask: Ask) -> Iterator[Answer]:
        """Send, follow redirects, and give the answer with its body unread.

        Raises:
            Again: where the connection fails.
            CkptError: FC473 offline, FC476 for a redirect that leads nowhere.
        """
        if is_offline():
            raise failures.not_cached(ask)
        told: dict[str, str] = {}
        for _ in range(_MAX_REDIRECTS):
            response = self._send(url, headers, ask)
            try:
                here = {name.lower(): value for name, value in response.headers.items()}
                if origin(url) == origin(self.endpoint):
                    told = {**told, **here}
                target = here.get("location")
                if response.status_code in _REDIRECTS and target:
                    url = _redirected(url, target, ask)
                    continue
                yield Answer(
                    status=response.status_code,
                    headers=here,
                    told=told,
                    url=url,
                    chunks=self._chunks(response, ask),
                )
                return
            finally:
                response.close()
        raise failures.bad_answer(ask, f"it is redirected more than {_MAX_REDIRECTS} times")

    def _send(self, url: str, headers: Mapping[str, str], ask: Ask) -> Any:
        from huggingface_hub import get_session

        own = self._headers() if origin(url) == origin(self.endpoint) else {}
        client = get_session()
        # A compressed body could not be told apart from a wrong one.
        sent = {**own, "Accept-Encoding": "identity", **headers}
        self.meter.add(num_requests=1)
        try:
            request = client.build_request("GET", url, headers=sent, timeout=_TIMEOUT_SECONDS)
            return client.send(request, stream=True, follow_redirects=False)
        except Exception as error:  # of the HTTP library
            failure = _failure(error, ask)
        raise failure  # out here: the error of HTTP has the request, and so the token

    def _headers(self) -> dict[str, str]:
        if self._own_headers is None:
            from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

            from flamingo_ckpt import __version__

            self._own_headers = build_hf_headers(
                token=self._token, library_name="flamingo-ckpt", library_version=__version__
            )
        return self._own_headers

    def _chunks(self, response: Any, ask: Ask) -> Iterator[bytes]:
        failure: Exception | None = None
        try:
            for chunk in response.iter_raw():
                self.meter.add(num_bytes=len(chunk))
                yield chunk
        except Exception as error:  # of the HTTP library
            failure = _failure(error, ask)
        if failure is not None:
            raise failure

    def check_status(self, answer: Answer, ask: Ask, wanted: tuple[int, ...]) -> None:
        """Raise for every status that is not wanted.

        Raises:
            Again: for one that may pass.
            CkptError: FC470, FC471, FC472, FC474.
        """
        status, kind = answer.status, answer.headers.get("x-error-code", "")
        if status in wanted:
            return
        if status in _PASSING:
            seconds = _retry_after(answer.headers)
            raise Again(f"the hub answered with status {status}", seconds)
        if kind == "GatedRepo":
            raise failures.gated(ask)
        if kind == "RevisionNotFound":
            raise failures.no_revision(ask)
        if kind == "EntryNotFound":
            raise failures.no_file(ask)
        if kind == "RepoNotFound" or status in (401, 404):
            raise failures.no_repository(ask)
        raise failures.unreachable(ask, f"the hub answered with status {status}")

    def persistently(self, attempt: Callable[[], _T], ask: Ask) -> _T:
        """Try until it passes, a few times.

        Raises:
            CkptError: FC474 where it does not.
        """
        for wait in (*_WAITS, None):
            try:
                return attempt()
            except Again as again:
                last = again
            if last.seconds > _MAX_WAIT_SECONDS:
                raise failures.unreachable(
                    ask,
                    f"{last.reason} and asks to wait {last.seconds:.0f} seconds",
                    "wait that long, then run the same command again",
                )
            if wait is not None:
                sleep(max(wait, last.seconds))
        raise failures.unreachable(ask, f"{last.reason}, {len(_WAITS) + 1} times")


def sleep(seconds: float) -> None:
    """Wait; a name of its own, so that tests need not."""
    time.sleep(seconds)


def _failure(error: Exception, ask: Ask) -> Exception:
    """What to raise for an error of the HTTP library: `Again` for one of the connection.

    Told by the name of its class: the library that `huggingface_hub` builds on is another one in
    every major version.
    """
    names = [one.__name__ for one in type(error).__mro__]
    if "TransportError" in names and names[0] not in ("UnsupportedProtocol", "LocalProtocolError"):
        return Again(failures.reason_of(error))
    return failures.unreachable(ask, failures.reason_of(error))


def origin(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port: where a token may go, or may not."""
    parts = urlsplit(url)
    default = {"https": 443, "http": 80}.get(parts.scheme)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or default


def _redirected(url: str, target: str, ask: Ask) -> str:
    found = urljoin(url, target)
    scheme = urlsplit(found).scheme
    if scheme not in ("http", "https") or (scheme == "http" and url.startswith("https:")):
        raise failures.bad_answer(ask, "it is redirected to an address that is not encrypted")
    return found


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds, from `Retry-After` (a number or a date) or the hub's own `RateLimit`."""
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,9}", value):
        return float(value)
    if value:
        try:
            then = parsedate_to_datetime(value)
            return max(0.0, (then - datetime.now(UTC)).total_seconds())
        except (ValueError, TypeError):
            return 0.0
    rate = re.search(r"\br\s*=\s*0\s*;\s*t\s*=\s*(\d{1,9})", headers.get("ratelimit", ""))
    return float(rate[1]) if rate else 0.0
