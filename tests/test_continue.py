"""A training that was killed and continued ends with the numbers of one that never was."""
import shutil
from contextlib import contextmanager

import pytest
import torch
from small import CHAINS, PAIRS, copy_of, rows, settings, trainer, weights
from transformers import Trainer, TrainerCallback

from she_nb.learning.ppo import PPOTrainer
from she_nb.learning.sft import Progress, run_training, sft_dataset, train_sft
from she_nb.learning.trainers import StepGRPOTrainer, train_rl
from she_nb.policy.adapters import with_adapter
from she_nb.policy.models import new_model


class Killed(Exception): pass


class Kill(TrainerCallback):
    def __init__(self, at): self.at = at

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at: raise Killed


@contextmanager
def kill(at):
    "Kill the book's own trainings at a step's begin."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "on_step_begin", Kill(at).on_step_begin, raising=False)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "What a training leaves that was never killed, by its name; each is made once."
    made = {}
    def get(name, train):
        if name not in made: made[name] = train(tmp_path_factory.mktemp("whole"))
        return made[name]
    return get


@pytest.mark.parametrize(("at", "changes"), [(3, {}), (4, {}), (7, {}), (9, {}), (7, {"micro_batch": 4}),
                                             (7, {"num_iterations": 2, "micro_batch": 4}), (7, {"beta": 0.1}),
                                             (3, {"dynamic": True}), (7, {"dynamic": True}), (7, {"ppo": True})], ids=str)
def test_rl_killed_and_continued_is_as_if_never_killed(policy, tokenizer, tmp_path, whole, at, changes):
    "Four steps are an epoch, a checkpoint is written after every second step."
    name, changes = f"rl {changes}", dict(changes)
    policy.save_pretrained(tmp_path / "policy")
    dynamic, trainer_class = changes.pop("dynamic", False), PPOTrainer if changes.pop("ppo", False) else StepGRPOTrainer

    def make(folder):
        model = str(tmp_path / "policy") if "beta" in changes else copy_of(policy, tokenizer)
        config = settings(folder, 10, save_strategy="steps", save_steps=2, **changes)
        return trainer(trainer_class, model, tokenizer, config, dynamic=dynamic, refill=1)

    def train(folder):
        run_training(run := make(folder), folder)
        return rows(run), weights(run.model)

    expected, learnt = whole(name, train)
    killed = make(tmp_path / "killed")
    killed.add_callback(Kill(at))
    with pytest.raises(Killed): run_training(killed, tmp_path / "killed")
    log = run_training(again := make(tmp_path / "killed"), tmp_path / "killed")
    assert [row["step"] for row in log] == list(range(1, 11))
    assert rows(again) == expected
    assert torch.equal(weights(again.model), learnt) and (learnt - weights(policy)).abs().max() > 1e-3


@pytest.mark.parametrize("muon_lr", [0.0, 4e-3])
@pytest.mark.parametrize("at", [3, 5, 9])
def test_sft_killed_and_continued_is_as_if_never_killed(tokenizer, tmp_path, whole, at, muon_lr):
    "Three steps are an epoch, a checkpoint is written after every third step."
    def go(folder):
        model = new_model(tokenizer, hidden_size=16, layers=1, heads=2)
        log = train_sft(model, tokenizer, sft_dataset(PAIRS, CHAINS), folder, steps=12, batch=4, muon_lr=muon_lr)
        uncounted = ("seconds", "num_tokens")  # TRL counts a continued run's tokens from its start
        return [{name: row[name] for name in row if name not in uncounted} for row in log], weights(model)

    log, learnt = whole(f"sft {muon_lr}", go)
    with kill(at), pytest.raises(Killed): go(tmp_path)
    again = go(tmp_path)
    assert log == again[0] and len(log) == 12
    assert torch.equal(learnt, again[1])


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("passed_over", [False, True])
def test_an_adapter_killed_and_continued_is_as_if_never_killed(policy, tokenizer, tmp_path, monkeypatch, beta, passed_over):
    "With beta TRL keeps a copy beside the adapter; some releases of transformers then pass the adapter over."
    def make(folder):
        model = with_adapter(copy_of(policy, tokenizer), "policy", rank=4)
        config = settings(folder, 6, save_strategy="steps", save_steps=2, beta=beta)
        return trainer(StepGRPOTrainer, model, tokenizer, config)

    run_training(whole := make(tmp_path / "whole"), tmp_path / "whole")
    killed = make(tmp_path / "killed")
    killed.add_callback(Kill(5))
    with pytest.raises(Killed): run_training(killed, tmp_path / "killed")
    if passed_over: monkeypatch.setattr(Trainer, "_load_from_checkpoint", lambda self, path, model=None: None)
    run_training(again := make(tmp_path / "killed"), tmp_path / "killed")
    assert rows(again) == rows(whole) and torch.equal(weights(again.model), weights(whole.model))
    assert (weights(whole.model) - weights(make(tmp_path / "new").model)).abs().max() > 1e-3


@pytest.mark.parametrize("steps", [4, 3])   # four are an epoch
def test_a_finished_training_is_not_trained_further(policy, tokenizer, tmp_path, steps):
    def go():
        config = settings(tmp_path, steps, save_strategy="steps", save_steps=2)
        return train_rl(copy_of(policy, tokenizer), tokenizer, PAIRS, config)

    (first, log), (second, same) = go(), go()
    assert log == same and torch.equal(weights(first.model), weights(second.model))


@pytest.mark.parametrize("lost", ["trainer_state.json", "rng_state.pth", "optimizer.pt", "model.safetensors"])
def test_a_checkpoint_that_was_being_written_is_passed_over(policy, tokenizer, tmp_path, whole, lost):
    def make(folder):
        config = settings(folder, 6, save_strategy="steps", save_steps=2, save_total_limit=None)
        return trainer(StepGRPOTrainer, copy_of(policy, tokenizer), tokenizer, config)

    def train(folder):
        run_training(run := make(folder), folder)
        return rows(run), weights(run.model), folder

    expected, learnt, left = whole("checkpoints", train)
    broken = tmp_path / "broken"
    shutil.copytree(left, broken)
    shutil.rmtree(broken / "checkpoint-6")
    for name in {lost, "trainer_state.json"}: (broken / "checkpoint-4" / name).unlink()
    run_training(again := make(broken), broken)
    assert rows(again) == expected and torch.equal(weights(again.model), learnt)


def test_seconds_go_on_where_the_killed_run_left_them(policy, tokenizer, tmp_path):
    def go():
        config = settings(tmp_path, 4, save_strategy="steps", save_steps=2)
        return [row["seconds"] for row in train_rl(copy_of(policy, tokenizer), tokenizer, PAIRS, config)[1]]

    with kill(3), pytest.raises(Killed): go()
    assert (seconds := go()) == sorted(seconds) and len(seconds) == 4
