"""The client of chat models: addresses, keys, how long it waits. Its errors: tests/evaluation/test_verifier.py."""

import time
from email.utils import formatdate

import pytest

from tests.chat_server import ChatServer, Reply
from trainers.data.chat_client import LONGEST_WAIT, ChatClient, ChatError, chat_endpoint, with_retries


@pytest.mark.parametrize(
    ("url", "plain", "versioned"),
    [
        ("http://h:8/v1", "http://h:8/v1/chat/completions", "http://h:8/v1/chat/completions"),
        ("http://h:8/v1/", "http://h:8/v1/chat/completions", "http://h:8/v1/chat/completions"),
        ("http://h:8", "http://h:8/chat/completions", "http://h:8/v1/chat/completions"),
        ("https://h/openai?v=2", "https://h/openai/chat/completions?v=2", "https://h/openai/v1/chat/completions?v=2"),
        ("http://h/x/chat/completions", "http://h/x/chat/completions", "http://h/x/chat/completions"),
    ],
)
def test_addresses(url: str, plain: str, versioned: str) -> None:
    assert chat_endpoint(url) == plain
    assert chat_endpoint(url, add_version=True) == versioned


@pytest.mark.parametrize("endpoint", ["file:///etc/hosts", "localhost:8000/v1", "", "http://", "ftp://h/v1"])
def test_only_addresses_of_http(endpoint: str) -> None:
    with pytest.raises(ValueError, match=r"judge_url: .* is no address; it begins with http:// or https://"):
        ChatClient(endpoint, url_name="judge_url")


@pytest.mark.parametrize(
    "host", ["api.openai.com", "huggingface.co.evil.example", "nothuggingface.co", "127.0.0.1:8000"]
)
def test_a_token_of_the_hub_goes_nowhere_else(host: str) -> None:
    with pytest.raises(ValueError, match="key holds a token of the Hub, and url is a server at") as error:
        ChatClient(f"http://{host}/v1/chat/completions", "hf_secret")
    assert "hf_secret" not in str(error.value)


@pytest.mark.parametrize("host", ["router.huggingface.co", "x.endpoints.huggingface.cloud", "HuggingFace.co"])
def test_a_token_of_the_hub_goes_to_the_hub(host: str) -> None:
    ChatClient(f"https://{host}/v1/chat/completions", "hf_secret")


@pytest.mark.parametrize("key", ["two\nlines", "schlüssel", "nul\0"])
def test_a_key_that_no_header_can_hold(key: str) -> None:
    with pytest.raises(ValueError, match="key holds a line break or another character") as error:
        ChatClient("http://h/v1", key)
    assert key not in str(error.value)


def test_a_redirect_does_not_take_the_key_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    other = ChatServer("YES")
    first = ChatServer(Reply("", status=302, headers={"Location": f"{other.url}/chat/completions"}))
    client = ChatClient(chat_endpoint(first.url), "secret")
    with pytest.raises(ChatError, match=f"status 302: it redirects to '{other.url}/chat/completions'") as error:
        client.complete({"messages": [{"content": "x"}]})
    assert not error.value.again and len(first.seen) == 1 and not other.seen
    first.close()
    other.close()


@pytest.mark.parametrize(
    ("asked", "pauses"),
    [
        (None, [0.5, 1.0]),
        ("3", [3.0, 3.0]),
        ("0.1", [0.5, 1.0]),
        ("86400", [LONGEST_WAIT] * 2),
        ("soon", [0.5, 1.0]),
        ("-5", [0.5, 1.0]),
        ("nan", [0.5, 1.0]),
    ],
)
def test_waits_double_and_the_server_may_ask_for_more(
    asked: str | None, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server, slept = ChatServer(Reply("", status=429, headers={"Retry-After": asked} if asked else {})), []
    client = ChatClient(chat_endpoint(server.url))
    with pytest.raises(ChatError) as error:
        with_retries(lambda: client.complete({"messages": [{"content": "x"}]}), 2, 0.5, slept.append)
    assert slept == pauses and error.value.tries == len(server.seen) == 3
    server.close()


def test_the_server_may_name_a_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ChatServer(Reply("", status=503, headers={"Retry-After": formatdate(time.time() + 30, usegmt=True)}))
    with pytest.raises(ChatError) as error:
        ChatClient(chat_endpoint(server.url)).complete({"messages": [{"content": "x"}]})
    assert 20 < error.value.wait <= 30
    server.close()
