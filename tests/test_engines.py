"A server that answers, dies, lies or is missing: what an engine makes of it."
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from zlib import crc32

import pytest

from she_nb.policy.engines import Sampling, Server, ServerEngine, VllmEngine, open_engine
from she_nb.task import BookError

IDS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]
WARM = Sampling(limit=6, temperature=1.0, seed=3)


def answer(asked, end=1):
    "What a model without weights says: its prompt and its seed decide all."
    if asked.get("echo"):
        rows = [[None, *(-token / 100 for token in ids[1:])] for ids in asked["prompt"]]
        return [{"index": i, "logprobs": {"token_logprobs": row}} for i, row in reversed(list(enumerate(rows)))]
    drawn = crc32(json.dumps([asked["prompt"], asked["seed"], asked["temperature"] > 0]).encode())
    ids = [2 + (drawn >> shift) % 200 for shift in range(1 + drawn % asked["max_tokens"])][:asked["max_tokens"] - 1] + [end]
    logps = [-token / 10 / max(asked["temperature"], 1) for token in ids]
    return [{"token_ids": ids, "finish_reason": "stop",
             "logprobs": {"token_logprobs": logps, "top_logprobs": [{"x": logps[0]}]}}]


class Fake:
    "A server of completions; `spoil` may answer in its place, by code and body, or close the connection with None."
    def __init__(self, spoil=lambda number, asked: False, models=({"id": "policy", "root": "/there/policy"},)):
        self.asked, self.lock, fake = [], Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_): pass
            def do_GET(self): self.say(200, {"data": list(models)})

            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    fake.asked.append(asked)
                    number = len(fake.asked)
                spoilt = spoil(number, asked)
                if spoilt is None: return self.connection.close()
                self.say(*spoilt if spoilt else (200, {"choices": answer(asked)}))

            def say(self, code, body):
                self.send_response(code)
                self.end_headers()
                self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self.http.serve_forever, kwargs={"poll_interval": .01}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def fake():
    made = []
    def start(*args, **kwargs):
        made.append(Fake(*args, **kwargs))
        return made[-1]

    yield start
    for each in made: each.http.shutdown()


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    "A folder called policy, with a config and a tokenizer: all that is read of a policy which a server holds."
    folder = tmp_path_factory.mktemp("served") / "policy"
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "qwen3", "max_position_embeddings": 512}')
    return folder


def engine(server, folder, **options): return ServerEngine(server.url, folder, **{"wait": .001, "tries": 3} | options)
def sentence(error): return str(error.value)


def test_the_same_responses_whatever_the_order_and_the_number_at_a_time(fake, folder):
    server = fake()
    whole = engine(server, folder).sampled(IDS, 3, WARM)
    assert [len(group) for group in whole] == [3] * 4 and len({response.ids[0] for group in whole for response in group}) > 6
    assert engine(server, folder, at_once=1).sampled(IDS, 3, WARM) == whole
    assert engine(server, folder).sampled(IDS[::-1], 3, WARM, places=[3, 2, 1, 0]) == whole[::-1]
    told = server.asked[0]
    assert {name: told[name] for name in ("model", "max_tokens", "temperature", "top_p", "stop_token_ids", "ignore_eos")} == {
        "model": "policy", "max_tokens": 6, "temperature": 1.0, "top_p": 1.0, "stop_token_ids": [1], "ignore_eos": True}


def test_continuations_are_scored_by_their_own_tokens(fake, folder):
    scores = engine(fake(), folder).continuation_logps(IDS, [[20], [30, 40]])
    assert scores.tolist() == [[-.2, pytest.approx(-.7)]] * 4


@pytest.mark.parametrize("spoilt", [(503, {}), (429, {}), (200, b"half an ans"), (200, []), None])
def test_what_may_pass_is_tried_again(fake, folder, spoilt):
    server = fake(lambda number, asked: spoilt if number % 2 else False)
    whole = engine(server, folder, at_once=1).sampled(IDS, 2, WARM)
    assert whole == engine(fake(), folder).sampled(IDS, 2, WARM)
    assert len(server.asked) == 16


def test_a_server_that_dies_mid_batch_leaves_what_was_finished(fake, folder, tmp_path):
    dying, kept = fake(lambda number, asked: None if number > 5 else False), tmp_path / "kept.jsonl"
    with pytest.raises(BookError) as error: engine(dying, folder, kept=kept, at_once=2).sampled(IDS, 3, WARM)
    assert dying.url in sentence(error) and "after 3 tries" in sentence(error) and "5 of 12 responses are kept" in sentence(error)
    assert "give the same command again" in sentence(error) and len(sentence(error)) < 300
    assert len(dying.asked) <= 5 + 2 * 3                       # no request begins after the first that failed for good
    again = fake()
    assert engine(again, folder, kept=kept).sampled(IDS, 3, WARM) == engine(fake(), folder).sampled(IDS, 3, WARM)
    assert len(again.asked) == 7


def test_in_one_process_a_second_call_asks_for_the_rest(fake, folder):
    alive = []
    server = fake(lambda number, asked: False if alive or number <= 5 else (500, {}))
    far = engine(server, folder, at_once=1)
    with pytest.raises(BookError, match="5 of 12 responses are kept"): far.sampled(IDS, 3, WARM)
    alive.append(True)
    before = len(server.asked)
    far.sampled(IDS, 3, WARM)
    assert len(server.asked) - before == 7 and not far.finished.responses


def test_a_refusal_is_not_tried_again(fake, folder):
    server = fake(lambda number, asked: (400, {"message": "max_tokens is too large"}))
    with pytest.raises(BookError, match="max_tokens is too large") as error:
        engine(server, folder, at_once=1).sampled(IDS, 1, WARM)
    assert len(server.asked) == 1 and server.url in sentence(error)


@pytest.mark.parametrize("body", [{}, {"choices": []}, {"choices": [{"text": "red"}]},
                                  {"choices": [{"token_ids": [4], "logprobs": {"token_logprobs": []}}]},
                                  {"choices": [{"token_ids": ["4"], "logprobs": {"token_logprobs": [-1]}}]}])
def test_an_answer_without_ids_or_log_probabilities_says_how_to_serve(fake, folder, body):
    with pytest.raises(BookError, match="gives no token ids with log-probabilities; serve the policy by vllm serve") as error:
        engine(fake(lambda number, asked: (200, body)), folder).sampled(IDS, 1, WARM)
    assert sentence(error).startswith("http://127.0.0.1")


def test_log_probabilities_without_the_temperature_are_refused(fake, folder):
    def raw(number, asked): return 200, {"choices": answer(asked | {"temperature": 1.0})}
    cool = Sampling(limit=6, temperature=0.5)
    with pytest.raises(BookError, match="without the temperature"): engine(fake(raw), folder).sampled(IDS, 1, cool)
    assert len(engine(fake(raw), folder).sampled(IDS, 1, Sampling(limit=6, temperature=0.5, logps=False))) == 4
    assert len(engine(fake(), folder).sampled(IDS, 1, cool)) == 4


def test_another_model_no_server_and_no_vllm_are_one_sentence_each(fake, folder):
    with pytest.raises(BookError, match="serves other, and policy is wanted"):
        engine(fake(models=[{"id": "other"}]), folder)
    with pytest.raises(BookError, match="serves nothing, and policy is wanted"): engine(fake(models=[]), folder)
    with pytest.raises(BookError, match="http://127.0.0.1:9: gives no answer after 2 tries"):
        Server("http://127.0.0.1:9/v1/", tries=2, wait=.001).ask(path="models")
    with pytest.raises(BookError, match="engine = ollama is unknown"): open_engine("ollama", folder)


def test_without_vllm_the_engine_says_where_to_find_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)   # as where it is not installed
    with pytest.raises(BookError, match="engine = vllm needs vLLM.*make test-vllm") as error: VllmEngine(folder)
    assert len(sentence(error)) < 300


def test_the_checks_of_vllm_are_no_part_of_the_tests():
    folder = Path(__file__).parent / "against_vllm"   # called vllm it would be found in the place of the package
    assert list(folder.glob("check_*.py")) and not list(folder.glob("test_*.py"))
