"""Clients that send slowly, send incomplete requests or lack the token."""

import socket
import time
from contextlib import suppress
from urllib.parse import urlsplit

import pytest
import requests

from gptj8.serving.guards import Limits
from tests.helpers.served_models import running, until

HEAD = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def connected(url):
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=10)


def rest(connection):
    """Return everything that the server sends until it closes the connection."""
    received = b""
    while piece := connection.recv(4096):
        received += piece
    return received


def ask_for_health(connection):
    """Request /health on a connection that stays open, and read the response."""
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    received = b""
    while not received.endswith(b"}"):
        piece = connection.recv(4096)
        assert piece, "the connection was closed"
        received += piece
    assert b"200 OK" in received


@pytest.fixture(scope="module")
def impatient(predictors):
    with running(predictors["base"], Limits(seconds_to_send=0.5)) as (url, engine):
        yield url, engine


@pytest.mark.parametrize("sent", [b"", b"POST /gen", HEAD], ids=["nothing", "a word", "no end"])
def test_incomplete_head_closes_connection(impatient, sent):
    begun = time.monotonic()
    with connected(impatient[0]) as connection:
        connection.sendall(sent)
        assert b"200 OK" not in rest(connection)
    assert 0.4 < time.monotonic() - begun < 5


@pytest.mark.parametrize(
    "framing",
    [b"Content-Length: 100\r\n", b"Transfer-Encoding: chunked\r\n"],
    ids=["length", "chunks"],
)
def test_incomplete_body_returns_408(impatient, framing):
    begun = time.monotonic()
    with connected(impatient[0]) as connection:
        piece = b'{"prompt": "a' if b"Length" in framing else b"d\r\n" + b'{"prompt": "a\r\n'
        connection.sendall(HEAD + framing + b"Connection: close\r\n\r\n" + piece)
        answer = rest(connection)
    assert b" 408 " in answer.splitlines()[0]
    assert b"the body did not arrive within 0.5 s" in answer
    assert time.monotonic() - begun < 5


def test_incomplete_second_request_closes_connection(impatient):
    with connected(impatient[0]) as connection:
        ask_for_health(connection)
        connection.sendall(HEAD)
        assert rest(connection) == b""


def test_frequent_requests_keep_connection_open(impatient):
    with connected(impatient[0]) as connection:
        for _ in range(15):  # three times the timeout of a head
            ask_for_health(connection)
            time.sleep(0.11)


def test_unread_response_closes_connection(predictors, monkeypatch):
    monkeypatch.setattr("gptj8.serving.guards._GRACE_SECONDS", 0.5)
    limits = Limits(seconds=0.5, seconds_to_send=0.5)
    with running(predictors["base"], limits) as (url, _):
        parts = urlsplit(url)
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((parts.hostname, parts.port))
            page = b"GET /static-offline-docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n"
            connection.sendall(page * 10)
            time.sleep(4)
            received = 0
            with suppress(ConnectionResetError):
                while piece := connection.recv(1 << 20):
                    received += len(piece)
            size = len(requests.get(url + "/static-offline-docs/swagger-ui-bundle.js").content)
            assert received < 10 * size
            assert requests.get(url + "/health", timeout=10).ok


def test_slow_clients_do_not_block_others(impatient):
    url, _ = impatient
    slow = [connected(url) for _ in range(50)]
    for connection in slow:
        connection.sendall(HEAD)
    body = {"prompt": "fox", "max_new_tokens": 4}
    assert requests.post(url + "/generate", json=body, timeout=10).status_code == 200
    until(lambda: all(rest(connection) == b"" for connection in slow))
    for connection in slow:
        connection.close()


def test_response_may_take_longer_than_send_timeout(impatient):
    body = {"prompt": "fox", "max_new_tokens": 100, "stream": True}
    begun = time.monotonic()
    with requests.post(impatient[0] + "/generate", json=body, stream=True, timeout=20) as answer:
        lines = []
        for line in answer.iter_lines():
            lines.append(line)
            time.sleep(0.02)
    assert any(b"finish_reason" in line for line in lines)
    assert time.monotonic() - begun > 0.5


@pytest.fixture(scope="module")
def guarded(predictors):
    with running(predictors["base"], token="open-sesame") as (url, _):
        yield url


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer open"}, {"Authorization": "open-sesame"}, {"Authorization": ""}],
    ids=str,
)
@pytest.mark.parametrize("path", ["/generate", "/classify", "/nowhere"])
def test_requests_without_token_are_rejected(guarded, path, headers):
    response = requests.post(guarded + path, json={}, headers=headers, timeout=10)
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert response.json() == {"detail": "send Authorization: Bearer and the server's token"}


def test_requests_with_token_are_answered(guarded):
    headers = {"Authorization": "Bearer open-sesame"}
    body = {"prompt": "fox", "max_new_tokens": 4}
    response = requests.post(guarded + "/generate", json=body, headers=headers, timeout=10)
    assert response.status_code == 200
    assert requests.get(guarded + "/health", timeout=10).status_code == 200


@pytest.mark.parametrize("scheme", ["bearer", "BEARER", "Bearer"])
def test_the_scheme_is_case_insensitive(guarded, scheme):
    headers = {"Authorization": f"{scheme} open-sesame"}
    body = {"prompt": "fox", "max_new_tokens": 2}
    response = requests.post(guarded + "/generate", json=body, headers=headers, timeout=10)
    assert response.status_code == 200


def test_a_browser_can_read_the_documentation_and_authorize(guarded):
    page = requests.get(guarded + "/docs", timeout=10)
    assert page.status_code == 200 and "swagger" in page.text
    script = requests.get(f"{guarded}/static-offline-docs/swagger-ui-bundle.js", timeout=10)
    assert script.status_code == 200
    described = requests.get(guarded + "/openapi.json", timeout=10).json()
    scheme = described["components"]["securitySchemes"]["HTTPBearer"]
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    for path in ("/generate", "/v1/completions"):
        assert described["paths"][path]["post"]["security"] == [{"HTTPBearer": []}]
    assert "security" not in described["paths"]["/health"]["get"]


def test_a_wrong_token_is_rejected_before_the_body_is_read(guarded):
    """A Content-Length is announced, and the body is never sent."""
    host, port = guarded.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = "POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 401")


def test_without_a_token_the_documentation_asks_for_none(predictors):
    with running(predictors["base"]) as (url, _):
        described = requests.get(url + "/openapi.json", timeout=10).json()
    assert "securitySchemes" not in described.get("components", {})
