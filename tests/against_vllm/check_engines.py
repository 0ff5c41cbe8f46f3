"The engines against each other, on the same weights and with the real vLLM. Part of `make test-vllm`."
import os
import random
import signal
import socket
import subprocess
import sys
import time
from urllib.request import urlopen

import pytest
from parts import make_policy, note
from small import PAIRS

from she_nb.policy.engines import Sampling, ServerEngine, TransformersEngine, VllmEngine, response_logps
from she_nb.policy.models import load_policy
from she_nb.serving.answers import Decoding
from she_nb.serving.judging import Judge, judge_rows
from she_nb.serving.judgment import Asked, stated_product
from she_nb.task import BookError, prompt

NEAR = 1e-3                       # between log-probabilities of two programs in fp32; what was measured is recorded
GREEDY, WARM = Sampling(limit=48), Sampling(limit=32, temperature=0.8, top_p=0.9, seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return make_policy(tmp_path_factory.mktemp("vllm") / "policy")


@pytest.fixture(scope="module")
def ours(folder): return TransformersEngine(*load_policy(folder))


@pytest.fixture(scope="module")
def theirs(folder): return VllmEngine(folder, enforce_eager=True, max_num_seqs=16)


@pytest.fixture(scope="module")
def prompts(ours):
    "The pairs' prompts, and longer ones of like words."
    rng, words = random.Random(0), [word for pair in PAIRS for word in pair.item.split()]
    texts = [prompt(pair.query, pair.item, "brief") for pair in PAIRS]
    texts += [prompt(pair.query, " ".join(rng.choices(words, k=3 + i)), "brief") for i, pair in enumerate(PAIRS)]
    return ours.tokenizer(texts, add_special_tokens=False)["input_ids"]


def furthest(engine, contexts, groups, sampling):
    "The largest difference between an engine's log-probabilities and those of transformers for the same tokens."
    return max(abs(there - here) for ids, group in zip(contexts, groups, strict=True) for response in group
               for there, here in zip(response.logps, response_logps(engine.model, ids, response.ids, sampling), strict=True))


def compared(name, ours, theirs, prompts):
    "Greedy text, log-probabilities of greedy and drawn tokens, and of continuations."
    mine, other = ours.sampled(prompts, 1, GREEDY), theirs.sampled(prompts, 1, GREEDY)
    drawn = theirs.sampled(prompts, 3, WARM)
    choices = ours.tokenizer([" 1", " 2", " 3", " 4"], add_special_tokens=False)["input_ids"]
    longer = ours.tokenizer([" red boots", " a blue mug"], add_special_tokens=False)["input_ids"]
    apart = [float((ours.continuation_logps(prompts[:6], some) - theirs.continuation_logps(prompts[:6], some)).abs().max())
             for some in (choices, longer)]
    found = {"prompts": len(prompts), "greedy_tokens": sum(len(group[0].ids) for group in mine),
             "greedy_equal": sum(a[0].ids == b[0].ids for a, b in zip(mine, other, strict=True)),
             "greedy_logp_difference": furthest(ours, prompts, other, GREEDY),
             "drawn": sum(map(len, drawn)), "drawn_logp_difference": furthest(ours, prompts, drawn, WARM),
             "tier_logp_difference": apart[0], "continuation_logp_difference": apart[1],
             "drawn_differ_within_groups": sum(len({tuple(one.ids) for one in group}) > 1 for group in drawn)}
    note(name, **found)
    assert found["greedy_equal"] == found["prompts"]
    assert max(value for key, value in found.items() if key.endswith("difference")) < NEAR
    return drawn


def test_vllm_says_what_transformers_says(ours, theirs, prompts):
    drawn = compared("vllm", ours, theirs, prompts)
    places = list(range(len(prompts)))[::-1]
    again = theirs.sampled(prompts[::-1], 3, WARM, places)[::-1]          # another order, the same places
    equal = sum(a.ids == b.ids for one, two in zip(drawn, again, strict=True) for a, b in zip(one, two, strict=True))
    note("vllm", equal_in_another_order=equal)
    assert equal >= 0.95 * 3 * len(prompts)                               # another batch, another rounding


def judged(folder, engine, tokenizer, precision):
    "Rows of a judge behind an engine."
    judge = Judge(engine, tokenizer, Decoding(limit=48, precision=precision), digest="0" * 16)
    asked = [Asked(pair.query, stated_product(pair.item), doc_id=pair.id) for pair in PAIRS]
    return judge_rows(judge, asked)


def same_judgments(name, one, two):
    tiers = sum(a["tier"] == b["tier"] for a, b in zip(one, two, strict=True))
    apart = max(abs(a[f"p_{tier}"] - b[f"p_{tier}"]) for a, b in zip(one, two, strict=True) for tier in (1, 2, 3, 4) if a["tier"])
    note(name, judged=len(one), same_tiers=tiers, tier_probability_difference=apart)
    assert tiers == len(one) and apart < NEAR


def test_a_judge_behind_vllm_judges_as_before(folder, ours, theirs):
    model, tokenizer = load_policy(folder)
    same_judgments("vllm", judged(folder, model, tokenizer, "single"), judged(folder, theirs, tokenizer, "single"))


class Served:
    "vLLM's own server of a folder."
    def __init__(self, folder, mode):
        with socket.create_server(("127.0.0.1", 0)) as free: port = free.getsockname()[1]
        words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--host", "127.0.0.1",
                 "--port", port, "--dtype", "float32", "--enforce-eager", "--max-num-seqs", 8, "--max-model-len", 1024,
                 "--logprobs-mode", mode]
        self.url, self.log = f"http://127.0.0.1:{port}", folder.parent / f"{mode}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(list(map(str, words)), stdout=log, stderr=log, start_new_session=True)

    def wait(self):
        for _ in range(1800):
            if self.process.poll() is not None: break
            try: return urlopen(f"{self.url}/health", timeout=5).close()
            except OSError: time.sleep(1)
        self.die()
        raise RuntimeError(self.log.read_text()[-3000:])

    def die(self):
        try: os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError: pass
        self.process.wait()


def test_a_server_that_dies_mid_batch_and_one_that_says_what_transformers_says(folder, ours, prompts, tmp_path):
    kept, plain = tmp_path / "kept.jsonl", Sampling(limit=32, temperature=0.8, seed=5, logps=False)
    raw, served = (Served(folder, mode) for mode in ("raw_logprobs", "processed_logprobs"))   # both at once: each takes a while
    try:
        raw.wait()
        far = ServerEngine(raw.url, folder, kept, tries=3, wait=.1, at_once=2)
        with pytest.raises(BookError, match="without the temperature"): far.sampled(prompts, 1, WARM)
        add, count = far.finished.add, []
        def add_and_kill(*row):
            add(*row)
            count.append(row)
            if len(count) == 10: raw.die()

        far.finished.add = add_and_kill
        with pytest.raises(BookError, match="gives no answer after 3 tries") as error: far.sampled(prompts, 2, plain)
    except BaseException:
        served.die()
        raise
    finally: raw.die()
    note("server", killed_after=10, kept=len(count), error=str(error.value).replace(raw.url, "http://HOST:PORT"))
    assert len(count) >= 10
    try:
        served.wait()
        again = ServerEngine(served.url, folder, kept)
        asked, post = [], again.respond
        again.respond = lambda payload: asked.append(payload) or post(payload)
        whole = again.sampled(prompts, 2, plain)
        fresh = ServerEngine(served.url, folder)
        assert len(asked) == 2 * len(prompts) - len(count)
        equal = sum(a.ids == b.ids for one, two in zip(whole, fresh.sampled(prompts, 2, plain), strict=True)
                    for a, b in zip(one, two, strict=True))
        note("server", asked_again=len(asked), equal_after_restart=equal)
        compared("server", ours, fresh, prompts)
        assert equal >= 0.95 * 2 * len(prompts)       # another batch, another rounding
        model, tokenizer = load_policy(folder)
        same_judgments("server", judged(folder, model, tokenizer, "single"), judged(folder, fresh, tokenizer, "served"))
    finally: served.die()
