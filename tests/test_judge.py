"""The judge endpoint: addresses, replies and failures as real servers have them, against a server of the test's own."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from rewards import Example
from support import endpoint as module
from support.endpoint import EndpointJudge, parse_score
from support.words import UserError

RIGHT, CASE = "<think>1 + 1 = 2</think><answer>2</answer>", Example(problem="1 + 1?", solution="<answer>2</answer>")


@pytest.fixture
def endpoint():
    """A chat endpoint that answers from a list, the last for ever; records requests."""
    replies, seen, asked = [], [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(self.path)
            seen.append((dict(self.headers), json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            body = replies.pop(0) if len(replies) > 1 else replies[0]
            code, headers, body = body if isinstance(body, tuple) else (200, {}, body)
            body = body(seen[-1][1]) if callable(body) else body
            body = body if isinstance(body, bytes) else json.dumps({"choices": [{"message": {"content": body}}]}).encode()
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            for n in range(0, len(body), 20 if b"slow" in body else 10**9):
                self.wfile.write(body[n:n + (20 if b"slow" in body else 10**9)])
                time.sleep(0.3 if b"slow" in body else 0)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", replies, seen
    server.shutdown()


def fair(body):
    """What a fair judge replies to the probe and to the cases here."""
    return '{"score": 95}' if "<answer>2</answer>" in json.loads(body["messages"][1]["content"])["answer"] else '{"score": 20}'


@pytest.fixture
def quick(monkeypatch):
    """No waiting between tries; what would have been waited for."""
    waited = []
    monkeypatch.setattr(EndpointJudge, "_wait", lambda self, seconds: waited.append(seconds) or sum(waited) < 1000)
    return waited


@pytest.mark.parametrize("reply, score", [
    ('{"score": 90}', 90), ('Sure!\n```json\n{"score": 0.5}\n```', 0.5), ('{"score": 100}', 100), ('{"score": "91"}', 91),
    ('<think>the {answer} is {right}</think>{"score": 91}', 91), ('{"note": {"a": 1}} {"score": 40} {"b": 2}', 40),
    ('First {"score": 10}, no: {"score": 88, "why": {"x": 1}}.', 88), ("{{{ }} {\"score\": 7}", 7)])
def test_scores_are_read_out_of_prose_and_reasoning(reply, score):
    assert parse_score(reply) == score


@pytest.mark.parametrize("reply", [
    "", "90", "{}", "}{", '{"score": 101}', '{"score": -1}', '{"score": NaN}', '{"score": Infinity}', '{"score": true}',
    '{"score": null}', '{"score": [90]}', '{"score": 1e999}', "{" * 100_000, None, '{"score": "ninety"}', '{"Score: 90"}',
    '{"score": {"score": 90}}', '{"score": __import__("os")}', "[" * 50_000 + "]" * 50_000, '<think>{"score": 90}'[:8]])
def test_anything_else_is_no_score(reply):
    with pytest.raises((ValueError, KeyError, TypeError, RecursionError)):
        parse_score(reply)


@pytest.mark.parametrize("tail", ["", "/", "/chat/completions", "/chat/completions/"])
def test_a_base_address_or_the_whole_path_with_or_without_a_slash(endpoint, tail):
    url, replies, seen = endpoint
    replies[:] = [(200, {}, fair)]
    judge = EndpointJudge(url + tail, "judge-1")
    judge.probe()
    assert judge(RIGHT, CASE) == 95 and judge.url == url + "/chat/completions"
    assert seen[0][1]["model"] == "judge-1" and seen[0][1]["max_tokens"] > 0 and seen[0][1]["temperature"] == 0


def test_a_malformed_reply_is_asked_again_then_is_no_score(endpoint, quick):
    url, replies, seen = endpoint
    judge = EndpointJudge(url)
    replies[:] = ["I will not", b"\x00garbage", '{"score": 88}']
    assert judge(RIGHT, CASE) == 88 and len(seen) == 3
    for hostile in (b"", b"[]", b"{}", b'{"choices": []}', b"[" * 100_000, b"\xff\xfe",
                    b'{"choices": [{"message": {"content": 7}}]}', b'{"choices": [{"message": {"content": null}}]}'):
        replies[:], before = [hostile], len(seen)
        assert judge(RIGHT, CASE) is None and len(seen) == before + 3
    assert "run out of tokens" in judge.problem


@pytest.mark.parametrize("code", [400, 401, 403, 404, 422])
def test_what_will_never_do_is_asked_once_and_the_servers_reason_is_shown(endpoint, quick, code):
    url, replies, seen = endpoint
    replies[:] = [(code, {}, b'{"error": "no model of that name"}')]
    with pytest.raises(UserError, match="no model of that name"):
        EndpointJudge(url).probe()
    assert len(seen) == 2 and not quick, "the right and the wrong case, once each"


def test_a_busy_server_is_asked_again_when_it_says(endpoint, quick):
    url, replies, seen = endpoint
    replies[:] = [(429, {"Retry-After": "7"}, b"busy"), (503, {}, b"starting"), (500, {}, b"oops"), '{"score": 88}']
    assert EndpointJudge(url)(RIGHT, CASE) == 88 and quick == [7.0, 1.0, 2.0]


def test_a_server_that_refuses_the_temperature_is_asked_without_it(endpoint):
    url, replies, seen = endpoint
    replies[:] = [(400, {}, b'{"error": "temperature must be 1"}'), '{"score": 88}']
    judge = EndpointJudge(url)
    assert judge(RIGHT, CASE) == 88 and "temperature" not in seen[1][1]
    judge(RIGHT, CASE)
    assert "temperature" not in seen[2][1]


@pytest.mark.parametrize("right, wrong", [("9.5", "2"), ("0.9", "0.1"), ("90", "95"), ("50", "10")])
def test_another_scale_does_not_pass_the_probe(endpoint, right, wrong):
    url, replies, _ = endpoint
    replies[:] = [f'{{"score": {right}}}', f'{{"score": {wrong}}}']
    with pytest.raises(UserError, match="does not score from 0 to 100"):
        EndpointJudge(url).probe()


def test_the_key_comes_from_the_environment_and_stays_out_of_sight(endpoint, quick, monkeypatch, capsys):
    url, replies, seen = endpoint
    monkeypatch.setenv("JUDGE_API_KEY", "secret-key\n")
    judge = EndpointJudge(url)
    replies[:] = ['{"score": 88}']
    assert judge(RIGHT, CASE) == 88 and seen[0][0]["Authorization"] == "Bearer secret-key"
    replies[:] = [(401, {}, b"the key secret-key is unknown")]
    with pytest.raises(UserError) as error:
        judge.probe()
    assert "secret-key" not in str(error.value) + str(vars(judge)) + "".join(capsys.readouterr())


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/", "no url", "ftp://x/", "http://no.such.host.invalid/v1"])
def test_an_endpoint_that_does_not_answer_is_a_sentence(url, quick):
    with pytest.raises(UserError, match="judge_url"):
        EndpointJudge(url, timeout=1).probe()


def test_a_judge_that_sends_a_byte_now_and_then_is_given_up(endpoint, quick):
    url, replies, _ = endpoint
    replies[:] = [b"slow" * 50]
    judge, started = EndpointJudge(url, timeout=0.5, patience=0.1), time.monotonic()
    assert judge(RIGHT, CASE) is None and "longer than 1 s" in judge.problem and time.monotonic() - started < 10


def test_nobody_waits_for_a_judge_when_the_run_stops(endpoint):
    url, replies, seen = endpoint
    replies[:] = [(503, {"Retry-After": "100"}, b"later")]
    judge, got = EndpointJudge(url), []
    thread = threading.Thread(target=lambda: got.append(judge(RIGHT, CASE)))
    thread.start()
    while not seen:
        time.sleep(0.01)
    judge.stopping = True
    thread.join(5)
    assert got == [None]


def test_a_judge_that_is_gone_is_not_waited_for_answer_by_answer(endpoint, quick):
    url, replies, seen = endpoint
    replies[:] = [(404, {}, b"gone")]
    judge = EndpointJudge(url)
    assert {judge(RIGHT, CASE) for _ in range(module.GIVE_UP + 30)} == {None} and len(seen) == module.GIVE_UP


def test_without_an_address_rules_judge():
    assert EndpointJudge()(RIGHT, CASE) > 50 and EndpointJudge().name == "rules" and EndpointJudge("http://x/v1", "m").name.startswith("m at")
