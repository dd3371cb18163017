"""Judging by a chat model behind any server with the OpenAI protocol: one request, its errors in words, retries.

On the standard library, because the client of `huggingface_hub` rewrites a strict `response_format` on its way to such
a server, and sends nothing at all under HF_HUB_OFFLINE, to a server on this machine neither.

A token of the Hub goes to the Hub only, a redirect is not followed (the key would go with it), and no message holds
the key.
"""

import http.client
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit, urlunsplit

NO_KEY = "EMPTY"  # sent to a server that asks for none
HUB_ROUTER = "https://router.huggingface.co/v1"  # the inference providers of the Hub
HUB_HOSTS = ("huggingface.co", "hf.co", "endpoints.huggingface.cloud")
LONGEST_WAIT = 60.0  # seconds between two tries, also where the server asks for more

_HUB_TOKEN = "hf_"
_ENDPOINT = "/chat/completions"
_RETRIED = (408, 409, 425, 429)  # and all from 500 on
_CHUNK = 1 << 16
_REMEDIES = {
    401: "is the key in {key} right?",
    402: "is there credit left for the key in {key}?",
    403: "may the key in {key} use this model?",
    404: "is the model's name right, and is {url} the address of the API (it often ends in /v1)?",
    405: "is {url} the address of the API (it often ends in /v1)?",
    408: "the server took too long; allow fewer requests at a time",
    413: "the texts are longer than the server allows",
    429: "too many requests, or no quota left; allow fewer at a time, or try later",
}
T = TypeVar("T")


class ChatError(RuntimeError):
    """A request without a usable reply.

    Args:
        message: names the address, what came back, and what to do.
        status: of HTTP, if there was one.
        again: whether the same request may succeed later.
        wait: seconds that the server asks to wait.
        reply: the model's text, if there was one.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        again: bool = False,
        wait: float = 0.0,
        reply: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.again, self.wait, self.reply = status, again, wait, reply
        self.tries = 1


class Judgement(NamedTuple):
    """What a judge says of one answer: right or wrong, None where it failed; its words; what failed."""

    correct: bool | None
    reply: str | None = None
    error: str | None = None


class ChatReply(NamedTuple):
    """The model's text; None for a refusal or where the server withheld it, and then the reason."""

    content: str | None
    reason: str | None = None


def with_retries(
    ask: Callable[[], T], retries: int, wait: float = 1.0, sleep: Callable[[float], Any] = time.sleep
) -> T:
    """What `ask` returns, asked again after errors that may pass.

    Args:
        ask: raises [`ChatError`].
        retries: how often it is asked again.
        wait: seconds before the first retry, twice as long before each further one, longer if the server asks for it,
            and never longer than a minute.
        sleep: for tests.

    Raises:
        ChatError: the last one, `tries` being set.
    """
    for attempt in range(retries + 1):
        try:
            return ask()
        except ChatError as error:
            error.tries = attempt + 1
            if not error.again or attempt == retries:
                raise
            sleep(min(max(wait * 2**attempt, error.wait), LONGEST_WAIT))
    raise AssertionError("retries is negative")


def chat_endpoint(url: str, add_version: bool = False) -> str:
    """The address that requests go to: `/chat/completions` is appended where it lacks.

    Args:
        url: of the API, e.g. `http://127.0.0.1:8000/v1`.
        add_version: append `/v1` before it to an address that does not end so, as `huggingface_hub` does; clients of
            OpenAI do not.
    """
    parts = urlsplit(url)
    path = parts.path.rstrip("/")
    if not path.endswith(_ENDPOINT):
        path += ("/v1" if add_version and not path.endswith("/v1") else "") + _ENDPOINT
    return urlunsplit(parts._replace(path=path))


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """None: a redirect is an error."""


class ChatClient:
    """One server, one key; may be used by several threads.

    Proxies are those of the environment (`HTTPS_PROXY`, `NO_PROXY`).

    Args:
        endpoint: the whole address, see [`chat_endpoint`].
        key: of the service; None where the server needs none.
        timeout: seconds of one request, reply included.
        url_name, key_name: what messages call the option or variable of either.

    Raises:
        ValueError: no address of http or https, a key that no header can hold, or a token of the Hub for another
            server.
    """

    def __init__(
        self,
        endpoint: str,
        key: str | None = None,
        *,
        timeout: float = 60.0,
        url_name: str = "url",
        key_name: str = "key",
    ) -> None:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url_name}: {endpoint!r} is no address; it begins with http:// or https://")
        if key and not (key.isascii() and key.isprintable()):
            raise ValueError(f"{key_name} holds a line break or another character that no key has; set it again")
        host = parts.hostname.lower()
        if key and key.startswith(_HUB_TOKEN) and not any(f".{host}".endswith(f".{known}") for known in HUB_HOSTS):
            raise ValueError(
                f"{key_name} holds a token of the Hub, and {url_name} is a server at {host}: such a token goes to "
                f"the Hub only; give the key of that server, or {NO_KEY!r} if it needs none"
            )
        self.endpoint, self.timeout, self.url_name, self.key_name = endpoint, timeout, url_name, key_name
        self.shown = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))
        self._key = key or NO_KEY
        self._opener = urllib.request.build_opener(_NoRedirect)

    def complete(self, body: dict[str, Any]) -> ChatReply:
        """The first choice of the reply to one request.

        Args:
            body: the request, sent as compact JSON in its own order.

        Raises:
            ChatError: no reply in time, or none that can be read.
        """
        data = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
        headers = {
            "Authorization": f"Bearer {self._key}",
            "Content-Type": "application/json",
            "Accept": "application/json",
            "User-Agent": "latent-reasoning",
        }
        request = urllib.request.Request(self.endpoint, data, headers, method="POST")
        return self._read_reply(self._send(request, body))

    def _send(self, request: urllib.request.Request, body: dict[str, Any]) -> bytes:
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                return self._read(response)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error, body) from None
        except urllib.error.URLError as error:
            reason = error.reason
            if isinstance(reason, TimeoutError):
                raise self._late() from None
            raise self._away(reason) from None
        except TimeoutError:
            raise self._late() from None
        except http.client.IncompleteRead as error:
            raise self._broken(f"broke off after {len(error.partial)} bytes") from None
        except (OSError, http.client.HTTPException) as error:
            raise self._away(error) from None

    def _read(self, response: Any) -> bytes:
        """The whole reply, also from a server that sends it drop by drop."""
        end, parts = time.monotonic() + self.timeout, []
        while part := response.read1(_CHUNK):
            parts.append(part)
            if time.monotonic() > end:
                raise TimeoutError
        content = b"".join(parts)
        missing = response.length  # of what the header announced
        if missing:
            raise http.client.IncompleteRead(content, missing)
        return content

    def _read_reply(self, data: bytes) -> ChatReply:
        text = data.decode("utf-8", "replace").strip()
        if text.startswith("<"):
            raise ChatError(
                f"{self.shown} answered with a web page instead of JSON ({_short(text)}): is {self.url_name} the "
                "address of the API (it often ends in /v1), and does a proxy or a login page stand before it?"
            )
        try:
            reply = json.loads(text)
        except (ValueError, RecursionError):
            raise self._broken(f"is no JSON ({_short(text) or 'empty'})") from None
        try:
            choice = reply["choices"][0]
            message = choice["message"]
            content, refusal = message.get("content"), message.get("refusal")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise self._broken(f"is no chat completion ({_short(text)})") from None
        ended = choice.get("finish_reason")
        if refusal:
            return ChatReply(None, f"the model refused: {_short(str(refusal))}")
        if not isinstance(content, str):
            return ChatReply(None, f"the reply holds no text (finish_reason {ended!r}): a refusal or a filter")
        return ChatReply(content, "the reply was cut off at its limit of tokens" if ended == "length" else None)

    # Errors in words

    def _refused(self, error: urllib.error.HTTPError, body: dict[str, Any]) -> ChatError:
        status = error.code
        try:
            detail = _detail(error.read(_CHUNK))
        except (OSError, http.client.HTTPException):
            detail = ""
        detail = detail.replace(self._key, "***") if self._key != NO_KEY else detail
        if 300 <= status < 400:
            remedy = f"it redirects to {error.headers.get('Location')!r}; if that is right, write it into {{url}}"
        elif status >= 500:
            remedy = "the server failed; look at its log, or try later"
        else:
            fields = ", ".join(name for name in body if name not in ("model", "messages"))
            unknown = f"does the server know the model {body.get('model')!r} and the fields {fields}?"
            remedy = _REMEDIES.get(status, unknown)
        remedy = remedy.replace("{url}", self.url_name).replace("{key}", self.key_name)
        return ChatError(
            f"{self.shown} answered with status {status}{f' ({detail})' if detail else ''}: {remedy}",
            status=status,
            again=status in _RETRIED or status >= 500,
            wait=_asked_wait(error.headers.get("Retry-After")),
        )

    def _late(self) -> ChatError:
        return ChatError(
            f"{self.shown} did not answer within {self.timeout:g} s: is the server overloaded? Allow fewer requests "
            "at a time, or a longer timeout",
            again=True,
        )

    def _away(self, reason: Any) -> ChatError:
        words = _short(str(reason)) or type(reason).__name__
        return ChatError(
            f"{self.shown} cannot be reached ({words}): is the server running, and is {self.url_name} its address?",
            again=True,
        )

    def _broken(self, what: str) -> ChatError:
        return ChatError(
            f"the reply of {self.shown} {what}: look at the server's log, and whether {self.url_name} is the address "
            "of a chat API",
            again=True,
        )


def _short(text: str) -> str:
    return f"{' '.join(text.split()):.120}"


def _detail(data: bytes) -> str:
    """What the server says of its error: the message in its JSON, else the beginning of its text."""
    text = data.decode("utf-8", "replace").strip()
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return _short(text)
    while isinstance(said, dict):
        inner = (said.get(name) for name in ("error", "message", "detail"))
        said = next((value for value in inner if value), None)
    return _short(str(said)) if said else ""


def _asked_wait(value: str | None) -> float:
    """Seconds of a `Retry-After`, which is a number or a date; 0 for none that can be read."""
    if not value:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0


__all__ = [
    "HUB_ROUTER",
    "NO_KEY",
    "ChatClient",
    "ChatError",
    "ChatReply",
    "Judgement",
    "chat_endpoint",
    "with_retries",
]
