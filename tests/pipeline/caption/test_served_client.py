"""Requests to a server that errs: what is tried again and when, what is final, how many go at once."""

from __future__ import annotations

import base64
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from pipeline.caption import client as chat
from pipeline.caption.client import Client, NoAnswer, Refused
from pipeline.faults import WorkerFault
from pipeline.recipe_captions import ServedModel
from pipeline.recipe_schema import RecipeError
from tests.fixtures.chat_server import KEY, ChatServer, Trouble, describe


class Clock:
    """Time that passes when somebody waits."""

    def __init__(self):
        self.now, self.waits, self.lock = 0.0, [], threading.Lock()

    def __call__(self):
        return self.now

    def sleep(self, seconds, stop):
        with self.lock:
            self.waits.append(seconds)
            self.now += seconds


@pytest.fixture
def server():
    with ChatServer() as found:
        yield found


def client(server, clock=None, **options):
    clock = clock or Clock()
    made = Client(ServedModel(url=server.url, model="m", **options), clock, clock.sleep)
    return made, clock


def body(text="say it"):
    return {"model": "m", "messages": [{"role": "user", "content": text}]}


def text_of(answer):
    return answer["choices"][0]["message"]["content"]


# ---------------------------------------------------------------- what is tried again


PASSING = [
    *(Trouble(status) for status in (408, 425, 429, 500, 502, 503, 504, 529)),
    *(Trouble(cut=n) for n in (0, 1, 40)),
    Trouble(garbage=b"<html>busy</html>"),
    Trouble(garbage=b'{"choices": []}'),
    Trouble(garbage=b'{"error": {"code": 502, "message": "upstream"}}'),
    Trouble(
        garbage=b'{"choices": [{"message": {"content": ""}, "error": {"code": 502, "message": "upstream"}}]}'
    ),
    Trouble(garbage=b'{"choices": [{"message": {"content": ""}, "error": "upstream"}]}'),
    Trouble(garbage=b'{"choices": [{"message": {"content": "\xff"}}]}'),
    Trouble(headers={"Content-Encoding": "gzip"}),
]


@pytest.mark.parametrize("trouble", PASSING, ids=str)
def test_what_the_moment_spoils_is_tried_again_after_a_wait(server, trouble):
    server.troubles = [trouble, trouble]
    asks, clock = client(server)
    assert text_of(asks.ask(body())).startswith("A street")
    assert len(server.bodies) == 3
    assert server.bodies[0] == server.bodies[2]
    first, second = clock.waits
    assert 0.375 <= first <= 0.625
    assert 0.75 <= second <= 1.25


def test_an_answer_nested_without_end_is_no_answer(server):
    server.troubles = [Trouble(garbage=b'{"choices": ' + b"[" * 200_000)]
    assert text_of(client(server)[0].ask(body())).startswith("A street")


@pytest.mark.parametrize(
    "said",
    ['{"choices": {"a": 1}}', '{"choices": "abc"}', '{"choices": [null]}', '{"choices": [{"text": "completed"}]}',
     '{"choices": [{"message": "A car."}]}'],
)  # fmt: skip
def test_what_is_no_chat_completion_is_paid_for_once(server, said):
    server.troubles = [Trouble(garbage=said.encode())] * 3
    with pytest.raises(Refused, match=r"127\.0\.0\.1:\d+: the answer is no chat completion: '\{"):
        client(server)[0].ask(body())
    assert len(server.bodies) == 1


def test_a_stream_that_nobody_asked_for_is_paid_for_once(server):
    stream = b'data: {"choices": [{"delta": {"content": "A car."}}]}\n\ndata: [DONE]\n\n'
    server.troubles = [Trouble(garbage=stream, headers={"Content-Type": "text/event-stream; charset=utf-8"})]
    with pytest.raises(Refused, match="answers in a stream"):
        client(server)[0].ask(body())
    assert len(server.bodies) == 1


def test_an_address_without_its_path_is_told_so(server):
    server.troubles = [Trouble(404, "Not Found")]
    asks = Client(ServedModel(url=server.url.removesuffix("/v1"), model="m"))
    with pytest.raises(WorkerFault, match=r"correct url \(is its API at http://127\.0\.0\.1:\d+/v1\?\)"):
        asks.ask(body())


def test_a_line_that_is_cut_is_no_answer_to_the_next_request(server):
    server.troubles = [Trouble(cut=30)]
    asks, _ = client(server)
    said = {text_of(asks.ask(body(f"{n}"))) for n in range(4)}
    assert len(said) == 4
    assert sum(server.answered.values()) == 4


@pytest.mark.parametrize("status", [400, 403, 404, 405, 413, 422, 501])
def test_a_refusal_is_final_with_the_servers_words(server, status):
    asks, clock = client(server)
    asks.ask(body("first"))  # so that the model is known to be there
    server.troubles = [Trouble(status, {"error": {"message": "image\nno. 3 is  odd"}})]
    with pytest.raises(Refused, match=rf"^127\.0\.0\.1:\d+: HTTP {status}: image no\. 3 is odd$"):
        asks.ask(body())
    assert len(server.bodies) == 2
    assert not clock.waits


@pytest.mark.parametrize(
    "said",
    ['{"error": {"message": "WORDS"}}', '{"error": "WORDS"}', '{"detail": "WORDS"}', '{"message": "WORDS"}', "WORDS",
     '{"detail": [{"loc": ["x"], "msg": "WORDS"}]}'],
)  # fmt: skip
def test_the_servers_words_are_found_wherever_it_puts_them(server, said):
    server.troubles = [Trouble(400, said)]
    with pytest.raises(Refused, match="WORDS"):
        client(server)[0].ask(body())


@pytest.mark.parametrize("status", [401, 402, 403, 404, 307])
def test_what_no_request_would_get_past_is_no_clips_fault(server, status):
    server.troubles = [Trouble(status, "words", {"Location": "http://127.0.0.1:9/"})]
    with pytest.raises(WorkerFault, match=r"words|elsewhere"):
        client(server)[0].ask(body())
    assert len(server.bodies) == 1


def test_credit_that_is_used_up_is_not_waited_for(server):
    server.troubles = [Trouble(429, {"error": {"message": "You exceeded", "code": "insufficient_quota"}})]
    with pytest.raises(WorkerFault, match=r"wants to be paid .*You exceeded"):
        client(server)[0].ask(body())


def test_a_server_that_is_away_is_no_clips_fault_and_comes_back(server):
    with ChatServer() as gone:
        url = gone.url
    options = ServedModel(url=url, model="m", tries=3)
    clock = Clock()
    with pytest.raises(
        WorkerFault, match=r"nobody answers at 127\.0\.0\.1:\d+ \(.*refused\), 3 times in a row; start"
    ):
        Client(options, clock, clock.sleep).ask(body())
    assert len(clock.waits) == 2
    with pytest.raises(
        RecipeError, match=r"nobody answers at http.*start the server of 'm' first, or correct the url"
    ):
        Client(options, clock, clock.sleep).hello()


def test_tries_and_time_are_bounded(server):
    server.troubles = [Trouble(500, "x")] * 20
    asks, clock = client(server, tries=4)
    with pytest.raises(NoAnswer, match="HTTP 500: x, 4 times in a row"):
        asks.ask(body())
    assert len(server.bodies) == 4
    asks, clock = client(server, tries=10, overall_s=3)
    with pytest.raises(NoAnswer, match=r"3 s are over \(overall_s\)"):
        asks.ask(body())
    assert clock.now <= 3


def test_a_server_on_which_everything_fails_is_given_up(server):
    server.troubles = [Trouble(400, "no")] * 100
    asks, _ = client(server)
    kinds = Counter()
    for n in range(chat.IN_A_ROW):
        try:
            asks.ask(body(f"{n}"))
        except (Refused, WorkerFault) as e:
            kinds[type(e)] += 1
    assert kinds == {Refused: chat.IN_A_ROW - 1, WorkerFault: 1}


# ---------------------------------------------------------------- waits


@pytest.mark.parametrize(
    ("name", "value", "seconds"),
    [
        ("Retry-After", "7", 7),
        ("retry-after-ms", "2500", 2.5),
        ("Retry-After", lambda: format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True), 20),
    ],
)
def test_retry_after_is_kept_to(server, name, value, seconds):
    value = value if isinstance(value, str) else value()
    server.troubles = [Trouble(503, "later", {name: value})]
    asks, clock = client(server)
    asks.ask(body())
    assert seconds - 1.5 * (seconds == 20) <= sum(clock.waits) <= seconds * (1 + chat.JITTER) + 0.01


@pytest.mark.parametrize("value", ["0", "-3", "nan", "Wed, 21 Oct 2015 07:28:00 GMT", "soon"])
def test_a_server_that_asks_for_no_wait_is_not_asked_without_end(server, value):
    server.troubles = [Trouble(429, "later", {"Retry-After": value})] * 4
    asks, clock = client(server)
    asks.ask(body())
    assert len(server.bodies) == 5
    assert clock.now >= 0.75 * (0.5 + 1 + 2 + 4)


def test_a_wait_that_would_take_too_long_is_not_begun(server):
    server.troubles = [Trouble(429, "later", {"Retry-After": "4000"})]
    asks, clock = client(server)
    with pytest.raises(NoAnswer, match=r"HTTP 429: later; with a wait of \d+ s 900 s are over"):
        asks.ask(body())
    assert not clock.waits


def test_nobody_asks_while_the_server_wants_to_be_left_alone(server):
    asks, clock = client(server)
    asks.gate.hold(50)
    asks.ask(body())
    assert clock.now == pytest.approx(50)


def test_the_rate_is_kept(server):
    asks, clock = client(server, per_minute=30)
    for n in range(5):
        asks.ask(body(f"{n}"))
    assert clock.now == pytest.approx(4 * 2)


@pytest.mark.parametrize(
    "trouble",
    [Trouble(stall=30), Trouble(drip=0.05), Trouble(slow_headers=0.05)],
    ids=["stalls", "drips", "drips headers"],
)
def test_a_server_that_stalls_or_drips_is_left_in_time(server, trouble):
    server.troubles = [trouble]
    made = Client(ServedModel(url=server.url, model="m", timeout_s=0.4), sleep=lambda seconds, stop: None)
    assert text_of(made.ask(body())).startswith("A street")
    assert len(server.bodies) == 2


def test_a_large_request_may_take_longer_to_send_than_to_connect(monkeypatch):
    monkeypatch.setattr(chat, "CONNECT_S", 0.3)
    said = b'{"choices": [{"message": {"content": "A long clip."}}]}'

    def serve(listening):
        line, _ = listening.accept()
        with line, line.makefile("rb") as received:
            time.sleep(1)  # its buffers are full by then
            length = next(
                int(h.split(b":")[1]) for h in iter(received.readline, b"") if h[:14] == b"Content-Length"
            )
            while received.readline() != b"\r\n":
                pass
            received.read(length)
            line.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(said), said))

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, args=(listening,), daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        asks = Client(ServedModel(url=url, model="m", tries=1))
        assert text_of(asks.ask(body("x" * 30_000_000))) == "A long clip."


# ---------------------------------------------------------------- at once


def many(asks, n):
    with ThreadPoolExecutor(32) as pool:
        return list(pool.map(lambda i: text_of(asks.ask(body(f"{i}"))), range(n)))


@pytest.mark.parametrize("concurrency", [1, 3, 8])
def test_as_many_at_once_as_the_recipe_says_and_no_more(server, concurrency):
    together = threading.Barrier(concurrency, timeout=60)  # nobody is answered before so many have asked

    def says(body):
        together.wait()
        return describe(body)

    server.says = says
    asks, _ = client(server, concurrency=concurrency)
    assert len(set(many(asks, 24))) == 24
    assert server.most == concurrency


def test_a_server_that_takes_fewer_at_once_is_soon_asked_for_no_more(server):
    server.service_s, server.at_once = 0.01, 3
    asks, _ = client(server, concurrency=16, tries=40)
    assert len(set(many(asks, 120))) == 120
    assert sum(server.answered.values()) == 120
    assert server.refused < 60


def test_the_gate_halves_once_for_requests_that_went_together():
    clock = Clock()
    gate = chat.Gate(16, None, clock, clock.sleep)
    stop = threading.Event()
    places = [gate.place(stop) for _ in range(16)]
    for place in places:
        place.__enter__()
    clock.now = 1.0
    for place in places:
        crowded = chat._Again("full", crowded=True)
        assert not place.__exit__(type(crowded), crowded, None)
    assert gate.allowed == 8
    for _ in range(8 * 9):  # about one more for as many answers as it allows
        with gate.place(stop):
            clock.now += 1
    assert 14 < gate.allowed <= 16


# ---------------------------------------------------------------- the key


def test_the_key_is_sent_and_nowhere_else(server, monkeypatch):
    server.key = KEY
    monkeypatch.setenv("MY_KEY", KEY)
    asks, _ = client(server, key_env="MY_KEY")
    asks.hello()
    server.says = lambda b: f"you are {KEY}"
    assert text_of(asks.ask(body())) == "you are …"
    monkeypatch.setenv("MY_KEY", "wrong-key-987654321")
    asks, _ = client(server, key_env="MY_KEY")
    for call in (asks.hello, lambda: asks.ask(body())):
        with pytest.raises(
            (WorkerFault, RecipeError), match=r"does not take the key in \$MY_KEY .*Bad key Bearer …"
        ):
            call()
    assert not any(KEY in str(b) for b in server.bodies)


def test_a_missing_key_and_secrets_in_the_recipe_are_told(monkeypatch):
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(RecipeError, match="variable NO_KEY is not set"):
        Client(ServedModel(url="http://x/v1", model="m", key_env="NO_KEY"))
    for url in ("http://me:pass@x/v1", "https://x/v1?key=abc"):
        with pytest.raises(ValueError, match="holds a secret"):
            ServedModel(url=url, model="m")
    for url in ("x/v1", "ftp://x", "http://", "http://x:99999999/"):
        with pytest.raises(ValueError, match="no address of a server"):
            ServedModel(url=url, model="m")


@pytest.fixture
def proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch.setenv


@pytest.mark.parametrize("named", ["http_proxy", "all_proxy"])
@pytest.mark.parametrize("scheme", ["http://", ""])
def test_a_proxy_of_the_environment_is_used(server, proxies, named, scheme):
    proxies(named, scheme + server.url.removeprefix("http://").removesuffix("/v1"))
    asks = Client(ServedModel(url="http://models.invalid/v1", model="m"))
    assert text_of(asks.ask(body())).startswith("A street")


def test_a_proxy_gets_its_name_and_password_and_nobody_else_sees_them(server, proxies):
    address = server.url.removeprefix("http://").removesuffix("/v1")
    proxies("http_proxy", f"http://us%40er:secret@{address}")
    Client(ServedModel(url="http://models.invalid/v1", model="m")).ask(body())
    assert server.headers[-1]["Proxy-Authorization"] == "Basic " + base64.b64encode(b"us@er:secret").decode()
    proxies("no_proxy", address)
    Client(ServedModel(url=server.url, model="m")).ask(body())
    assert server.headers[-1]["Proxy-Authorization"] is None
    proxies("http_proxy", "socks5://me:secret@proxy:1")
    with pytest.raises(RecipeError, match=r"a proxy for http \('proxy:1'\) that is no http://HOST:PORT"):
        Client(ServedModel(url="http://models.invalid/v1", model="m"))


def test_a_proxy_that_is_away_or_wants_a_password_is_no_clips_fault(server, proxies):
    with ChatServer() as gone:
        pass
    proxies("http_proxy", gone.url.removesuffix("/v1"))
    clock = Clock()
    asks = Client(ServedModel(url="http://models.invalid/v1", model="m", tries=2), clock, clock.sleep)
    with pytest.raises(WorkerFault, match=r"proxy lets nobody through .*refused.*; correct http_proxy"):
        asks.ask(body())
    proxies("http_proxy", server.url.removesuffix("/v1"))
    server.troubles = [Trouble(407, "who are you?")]
    with pytest.raises(WorkerFault, match="proxy wants a name and password"):
        Client(ServedModel(url="http://models.invalid/v1", model="m")).ask(body())
