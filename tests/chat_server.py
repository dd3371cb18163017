"""A server with the OpenAI protocol on this machine, which also misbehaves as servers do."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What the server does with one request.

    Args:
        content: the model's text; None for a refusal.
        status: of HTTP; for any other than 200 the content is the server's words on its error.
        raw: the whole body, instead of a chat completion.
        headers: more of them.
        delay: seconds before anything is sent.
        drip: seconds between any two bytes of the body.
        lost: bytes that the header announces and that never come.
        hang_up: close the connection without a word.
        message: more fields of the message, e.g. `refusal`.
        finish: why the model stopped.
    """

    content: str | None = ""
    status: int = 200
    raw: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    drip: float = 0.0
    lost: int = 0
    hang_up: bool = False
    message: dict[str, Any] = field(default_factory=dict)
    finish: str = "stop"

    def body(self) -> bytes:
        if self.raw is not None:
            return self.raw
        if self.status != 200:
            return json.dumps({"error": {"message": self.content}}).encode()
        message = {"role": "assistant", "content": self.content, **self.message}
        choice = {"index": 0, "finish_reason": self.finish, "message": message}
        whole = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        return json.dumps(whole).encode()


class ChatServer:
    """`replies` are given out in order, the last one for ever.

    A reply is a [`Reply`], a text of the model, the status of an error, or a function that makes one from the text of
    the request. `seen` holds every request: its path, its key (the whole header), its body as sent and as JSON, and
    its text.
    """

    def __init__(self, *replies: Reply | str | int | Callable[[str], Reply | str]) -> None:
        self.replies: list[Any] = list(replies)
        self.seen: list[dict[str, Any]] = []
        self._lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                reply = outer._next(self.path, self.headers["Authorization"], data)
                time.sleep(reply.delay)
                self.close_connection = True
                if reply.hang_up:
                    return
                body = reply.body()
                try:
                    self.send_response(reply.status)
                    for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(body) + reply.lost))
                    self.end_headers()
                    for start in range(0, len(body), 1 if reply.drip else max(len(body), 1)):
                        self.wfile.write(body[start : start + 1] if reply.drip else body)
                        time.sleep(reply.drip)
                except OSError:
                    pass  # the client waits no longer

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.block_on_close = False
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def _next(self, path: str, key: str, data: bytes) -> Reply:
        body = json.loads(data)
        text = body["messages"][0]["content"]
        with self._lock:
            self.seen.append({"path": path, "key": key, "data": data, "body": body, "text": text})
            reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if callable(reply):
            reply = reply(text)
        if isinstance(reply, int):
            return Reply("broken", status=reply)
        return reply if isinstance(reply, Reply) else Reply(reply)

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
