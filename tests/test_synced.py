"Training by an engine that is sent the weights: what the trainer makes of one that follows, and of one that does not."
import importlib
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import refused
from small import PAIRS, copy_of, moved, settings
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration

from she_nb.learning.trainers import curve_rows, train_rl
from she_nb.policy.adapters import with_adapter
from she_nb.policy.engines import Sampling, TransformersEngine
from she_nb.policy.models import load_policy, save_policy
from she_nb.policy.synced import TrainedGeneration
from she_nb.task import BookError


class Params(SimpleNamespace):
    "vLLM's SamplingParams."
    def clone(self): return Params(**vars(self))


class Engine:
    "vLLM's LLM with transformers behind it; weights that are sent to one that does not follow are lost."
    follows, opened, asked = True, {}, []

    def __init__(self, model, **options):
        self.model, self.tokenizer = load_policy(model)
        type(self).opened, type(self).asked = options, []
        self.llm_engine = self.model_executor = self.driver_worker = self.model_runner = self   # the way to its weights

    def get_model(self): return self.model
    def reset_prefix_cache(self): pass

    def reload_weights(self, weights_iterator):
        if self.follows: self.model.load_state_dict(dict(weights_iterator), strict=False)

    def generate(self, prompts, sampling_params, use_tqdm):
        self.asked.append([params.seed for params in sampling_params])
        return [self.answer(one["prompt_token_ids"], params) for one, params in zip(prompts, sampling_params, strict=True)]

    def answer(self, ids, params):
        how = Sampling(params.max_tokens, params.temperature, seed=params.seed)
        response = TransformersEngine(self.model, self.tokenizer).sampled([ids], 1, how)[0][0]
        logps = [{token: SimpleNamespace(logprob=logp, rank=1)} for token, logp in zip(response.ids, response.logps, strict=True)]
        return SimpleNamespace(prompt_token_ids=ids, outputs=[SimpleNamespace(token_ids=response.ids, logprobs=logps)])


@pytest.fixture
def vllm(monkeypatch):
    "A package vllm, where there is none."
    package, generation = ModuleType("vllm"), importlib.import_module("trl.generation.vllm_generation")
    package.__spec__ = ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", package)
    for name, value in {"is_vllm_available": lambda: True, "LLM": Engine, "SamplingParams": Params}.items():
        monkeypatch.setattr(generation, name, value, raising=False)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"): monkeypatch.setenv(name, "0")   # put back
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(Engine, "follows", True)


@pytest.fixture(scope="module")
def folder(policy, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("start") / "policy"
    save_policy(policy, tokenizer, folder)
    return str(folder)


def train(folder, tokenizer, out, **changes):
    return train_rl(folder, tokenizer, PAIRS, settings(out, **changes), engine="vllm", credit="srpo_return")


def test_what_is_sent_of_an_adapter_is_what_trl_sends(policy, tokenizer):
    model = with_adapter(copy_of(policy, tokenizer), "policy", rank=4)
    for name, weight in model.named_parameters():
        if "lora_B" in name: weight.data += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    generation = object.__new__(TrainedGeneration)
    generation.model, generation._dist = model, DistributedBackend(Accelerator(cpu=True))
    ours = {name: weight.clone() for name, weight in generation._iter_named_params()}
    theirs = {name: weight.clone() for name, weight in VLLMGeneration._iter_named_params(generation)}
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items(): torch.testing.assert_close(ours[name], weight)


def test_srpo_learns_from_what_vllm_samples(vllm, folder, tokenizer, tmp_path):
    trainer, log = train(folder, tokenizer, tmp_path, steps=3)
    rows = curve_rows(log)
    assert moved(trainer, load_policy(folder, train=True)[0]) and len(rows) == 3
    assert trainer.packed_update and trainer.vllm_importance_sampling_mode == "token_truncate"
    for row in rows:
        assert row["sampling_gap"] < 1e-4 and row["sampling_gap_largest"] < 1e-3
        assert row["sampling_weight_least"] == pytest.approx(1, abs=1e-3) == row["sampling_weight_most"]
    seeds = [seed for asked in Engine.asked for seed in asked]
    assert len(set(seeds)) == len(seeds) == 3 * 12                     # one for each response
    assert (Engine.opened["dtype"], Engine.opened["enforce_eager"]) == ("float32", True)
    assert Engine.opened["max_model_len"] == trainer.model.config.max_position_embeddings


def test_an_engine_that_does_not_follow_ends_the_training(vllm, folder, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(Engine, "follows", False)
    with pytest.raises(BookError, match="it does not follow the weights; set engine = shared") as error:
        train(folder, tokenizer, tmp_path, steps=8, lr=2e-2)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("why", ["No backend takes heads of 16.\nAnd so on.", ""])
def test_what_vllm_refuses_is_one_sentence(vllm, folder, tokenizer, tmp_path, monkeypatch, why):
    def refuses(*args, **options): raise ValueError(why)
    monkeypatch.setattr(Engine, "__init__", refuses)
    with pytest.raises(BookError, match="vLLM can't train this model.*set engine = shared") as error:
        train(folder, tokenizer, tmp_path)
    assert "\n" not in str(error.value) and (why or "ValueError").split(".")[0] in str(error.value)


@pytest.mark.skipif(bool(find_spec("vllm")), reason="vLLM is installed here")
def test_a_book_without_vllm_is_refused_before_anything_runs(desk):
    for engine in ("vllm", "http://127.0.0.1:9"):
        refused(desk.run("book", "--preset", "micro", "-p", "engine", engine), f"engine = {engine} trains by vLLM, which is not")
        assert not [path for path in desk.files() if path.name != "lock"]


def test_what_needs_the_books_own_rollout_is_refused_before_anything_runs(desk):
    words = "-p", "engine", "vllm", "-p", "arms", "srpo,srpo+selection=dynamic"
    refused(desk.run("book", "--preset", "micro", *words), "can't train srpo+selection=dynamic")
    assert not desk.files()
