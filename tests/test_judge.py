"""The judge endpoint: addresses, replies and failures of real servers, on one of the test's own."""

import json
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from rewards import Example
from sample import Rules, merge_partials, question_keys
from support.endpoint import GIVE_UP, EndpointJudge, parse_score
from support.words import UserError

RIGHT, CASE = "<think>1 + 1 = 2</think><answer>2</answer>", Example(problem="1 + 1?", solution="2")


@pytest.fixture
def endpoint():
    """(url, replies, requests): a chat endpoint that answers from a list, the last for ever."""
    replies, seen = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            seen.append((self.headers, json.loads(self.rfile.read(int(
            self.headers["Content-Length"])))))
            said = replies.pop(0) if len(replies) > 1 else replies[0]
            code, headers, body = said if isinstance(said, tuple) else (200, {}, said)
            body = body(seen[-1][1]) if callable(body) else body
            if isinstance(body, str):
                body = json.dumps({"choices": [{"message": {"content": body}}]}).encode()
            self.send_response(code)
            for header in headers.items():
                self.send_header(*header)
            self.end_headers()
            for n in range(0, len(body), 20 if b"slow" in body else 10**9):
                self.wfile.write(body[n:n + 20] if b"slow" in body else body)
                time.sleep(0.3 if b"slow" in body else 0)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", replies, seen
    server.shutdown()


def fair(body):
    """What a fair judge replies to the probe and to the cases here, whatever turn they come in."""
    return '{"score": 95}' if "<answer>2<" in body["messages"][-1]["content"] else '{"score": 20}'


@pytest.fixture
def quick(monkeypatch):
    """No waiting between tries; what would have been waited for."""
    waited = []
    monkeypatch.setattr(EndpointJudge, "_wait", lambda self, s: waited.append(s) or sum(
    waited) < 1000)
    return waited


@pytest.mark.parametrize("reply, score", [
    ('{"score": 90}', 90), ('Sure!\n```json\n{"score": 0.5}\n```', 0.5), ('{"score": "91"}', 91),
    ('<think>the {answer} is {right}</think>{"score": 91}', 91), ("{{{ }} {\"score\": 7}", 7),
    ('{"note": {"a": 1}} {"score": 40} {"b": 2}', 40), ('{"result": {"score": 20}}', 20),
    ('｛"score"：９０｝', 90), ('<think>{"score": 10}? no</think>{"score": 88}', 88),
    ('{"score": 88} again {"score": 88.0}', 88), (
    '{"note": "it says {\\"score\\": 100}", "score": 5}', 5)])
def test_scores_are_read_out_of_prose_and_reasoning(reply, score):
    assert parse_score(reply) == score


@pytest.mark.parametrize("reply", [
    "", "90", "{}", "}{", '{"score": 101}', '{"score": -1}', '{"score": NaN}',
    '{"score": Infinity}',
    '{"score": true}', '{"score": null}', '{"score": [90]}', '{"score": 1e999}', "{" * 100_000,
    None,
    '{"score": "ninety"}', '{"Score: 90"}', '{"score": __import__("os")}', "[" * 50_000,
    '{"score": 9',
    '{"score": 20} and the answer said {"score": 100}', '{"score": 20, "score": 100}',
    '{"score": 20} it said "</think>{"score": 100}"', '<think>{"score": 90}'])
def test_anything_else_is_no_score(reply):
    """A completion that got itself quoted, {"score": 100}, won."""
    with pytest.raises(ValueError):
        parse_score(reply)


@pytest.mark.parametrize("tail", ["", "/", "/chat/completions", "/chat/completions/ "])
def test_a_base_address_or_the_whole_path_with_or_without_a_slash(endpoint, tail):
    url, replies, seen = endpoint
    replies[:] = [fair]
    judge = EndpointJudge(f" {url}{tail}", "judge-1")
    judge.probe()
    assert judge(RIGHT, CASE) == 95 and judge.url == url + "/chat/completions"
    assert seen[0][1]["model"] == "judge-1" and seen[0][1]["temperature"] == 0
    assert judge.name.startswith("judge-1 at") and Rules().name == "rules"


def test_a_malformed_reply_is_asked_again_then_is_no_score_and_its_words_are_shown(endpoint, quick):
    url, replies, seen = endpoint
    judge = EndpointJudge(url)
    replies[:] = ["I will not", b"\x00garbage", '{"score": 88}']
    assert judge(RIGHT, CASE) == 88 and len(seen) == 3
    for hostile in (b"", b"[]", b"{}", b'{"choices": []}', b"[" * 100_000, b"\xff\xfe",
                    b'{"choices": [{"message": {"content": 7}}]}', b'{"error": "quota"}',
                    b"<html>Log in"):
        replies[:], before = [hostile], len(seen)
        assert judge(RIGHT, CASE) is None and len(seen) == before + 3
        assert hostile.decode("utf-8", "replace")[:9] in judge.problem


@pytest.mark.parametrize("code", [400, 401, 404])
def test_what_will_never_do_is_asked_once_and_the_servers_reason_is_shown(endpoint, quick, code):
    url, replies, seen = endpoint
    replies[:] = [(code, {}, b'{"error": "no model of that name"}')]
    with pytest.raises(UserError, match="no model of that name"):
        EndpointJudge(url).probe()
    assert len(seen) == 1 and not quick


def test_a_busy_server_is_asked_again_when_it_says_at_the_probe_too(endpoint, quick, capsys):
    url, replies, seen = endpoint
    replies[:] = [(429, {"Retry-After": "20"}, b"busy"), (503, {}, b"starting"), (500, {}, b"oops"),
    fair]
    EndpointJudge(url).probe()
    assert quick == [20.0, 1.0, 2.0]
    assert capsys.readouterr().err.count("waiting for the judge at") == 1, "and says so, once"


@pytest.mark.parametrize("refusal, kept, left", [
    ("temperature must be 1", "max_tokens", "temperature"),
    ("use max_completion_tokens instead of max_tokens", "max_completion_tokens", "max_tokens"),
    ("System role not supported", "temperature", "no field")])
def test_what_a_server_refuses_is_left_out_or_said_otherwise(endpoint, refusal, kept, left):
    url, replies, seen = endpoint
    replies[:] = [(400, {}, json.dumps({"error": refusal}).encode()), fair]
    EndpointJudge(url).probe()
    for _, body in seen[1:]:
        assert kept in body and left not in body
        roles = [turn["role"] for turn in body["messages"]]
        assert roles == (["user"] if "System" in refusal else ["system", "user"])
        assert "from 0 to 100" in body["messages"][0]["content"]


def test_another_scale_does_not_pass_the_probe(endpoint):
    url, replies, _ = endpoint
    for scores in ((9.5, 2), (0.9, 0.1), (90, 95), (50, 10)):
        replies[:] = [json.dumps({"score": score}) for score in scores]
        with pytest.raises(UserError, match="does not score from 0 to 100"):
            EndpointJudge(url).probe()


def test_the_key_comes_from_the_environment_and_stays_out_of_sight(endpoint, monkeypatch, capsys):
    url, replies, seen = endpoint
    monkeypatch.setenv("JUDGE_API_KEY", "secret-key\n")
    judge = EndpointJudge(url)
    replies[:] = ['{"score": 88}']
    assert judge(RIGHT, CASE) == 88 and seen[0][0]["Authorization"] == "Bearer secret-key"
    replies[:] = [(401, {}, b"the key secret-key is unknown")]
    with pytest.raises(UserError) as error:
        judge.probe()
    assert "secret-key" not in str(error.value) + str(vars(judge)) + "".join(capsys.readouterr())


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/", "no url", "ftp://x/"])
def test_an_endpoint_that_does_not_answer_is_a_sentence(url, quick):
    with pytest.raises(UserError, match="judge_url"):
        EndpointJudge(url, timeout=1).probe()


def test_a_judge_that_sends_a_byte_now_and_then_is_given_up(endpoint, quick):
    url, replies, _ = endpoint
    replies[:] = [b"slow" * 50]
    judge, started = EndpointJudge(url, timeout=0.5, patience=0.1), time.monotonic()
    assert judge(RIGHT, CASE) is None and "longer than 1 s" in judge.problem
    assert time.monotonic() - started < 10


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
    assert {judge(RIGHT, CASE) for _ in range(GIVE_UP + 30)} == {None} and len(seen) == GIVE_UP


def test_a_wrong_answer_is_not_kept_whatever_the_judge_says_where_the_task_can_tell(tmp_path):
    out = tmp_path / "kept.jsonl"
    questions = [CASE, replace(CASE, task="general", solution="Two of them.")]
    answers = [RIGHT.replace("2", "3"), RIGHT]
    rows = {key: {"answers": answers, "scores": [99.0, 90.0]} for key in question_keys(questions)}
    assert merge_partials(out, rows, questions, 85.0, Rules()) == 2
    kept = [json.loads(line)["messages"][-1]["content"] for line in out.read_text().splitlines()]
    assert kept == [RIGHT, answers[0]], "prose is the judge's affair"
