"""What we rely on in TRL's GRPOTrainer, and what step credit owes it: equal numbers wherever both should agree."""
import json
import math
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from small import (
    PAIRS,
    TRUTHS,
    RecordingTrainer,
    ScriptedTrainer,
    copy_of,
    moved,
    rows,
    scripted_responses,
    settings,
    trainer,
    weights,
)
from transformers import set_seed
from trl import GRPOTrainer

from she_nb.learning.advantage import CREDIT, advantage
from she_nb.learning.trainers import StepGRPOTrainer, curve_rows, rl_dataset, train_rl
from she_nb.policy.models import new_model
from she_nb.task import BookError, parse
from she_nb.verifier import step_rewards

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo")


def right_tier(completions, row, **kwargs):
    "The outcome as a stock reward function computes it, from TRL's own text."
    return [step_rewards(text, TRUTHS[i])[4] for text, i in zip(completions, row, strict=True)]


def stock(model, tokenizer, config, trainer_class=GRPOTrainer):
    set_seed(config.seed)
    return trainer_class(model, reward_funcs=right_tier, args=config, train_dataset=rl_dataset(PAIRS), processing_class=tokenizer)


class Widened(GRPOTrainer):
    "Stock TRL, whose (B,) advantages are repeated along the tokens."
    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        output["advantages"] = output["advantages"].unsqueeze(1).repeat(1, output["completion_ids"].shape[1])
        return output


def same(one, other, names=("loss", "grad_norm", "entropy", "reward")):
    "Two trainings had one history, and left one set of weights."
    assert len(rows(one)) == len(rows(other)) > 3
    for left, right in zip(rows(one), rows(other), strict=True):
        for name in names:
            assert left.get(name, 0) == pytest.approx(right.get(name, 0), rel=1e-6, abs=1e-6), (left["step"], name)
    assert (weights(one.model) - weights(other.model)).abs().max() < 1e-6


# TRL takes (B, T)

@pytest.mark.parametrize("loss", LOSSES)
def test_trl_still_takes_an_advantage_for_every_token(policy, tokenizer, tmp_path, loss):
    "Fails on the day that TRL drops (B, T) from one of its losses."
    run = stock(copy_of(policy, tokenizer), tokenizer, settings(tmp_path, loss_type=loss))
    batch = run._prepare_inputs([row for row in run.train_dataset.select(range(3)) for _ in range(4)])
    batch["advantages"] = torch.linspace(-1, 1, len(batch["advantages"]))
    ids, attention_mask = (torch.cat([batch[f"prompt_{name}"], batch[f"completion_{name}"]], 1) for name in ("ids", "mask"))
    length = batch["completion_ids"].shape[1]
    logps = run._get_per_token_logps_and_entropies(run.model, ids, attention_mask, length)[0]
    batch["old_per_token_logps"] = logps.detach() + 0.1
    run.current_gradient_accumulation_steps = 1
    results = []
    for wide in (False, True):
        one = dict(batch)
        if wide: one["advantages"] = batch["advantages"].unsqueeze(1).expand(-1, length)
        run.model.zero_grad()
        value = run.compute_loss(run.model, one)
        value.backward()
        results.append((value.item(), torch.cat([parameter.grad.flatten() for parameter in run.model.parameters()])))
    assert abs(results[0][0] - results[1][0]) < 1e-6 and (results[0][1] - results[1][1]).abs().max() < 1e-6
    assert results[0][1].abs().max() > 1e-3  # and the batch teaches something


@pytest.mark.parametrize("changes", [{}, {"num_iterations": 2}, {"micro_batch": 4}, {"beta": 0.1}], ids=str)
def test_constant_token_advantages_train_like_scalar_ones(policy, tokenizer, tmp_path, changes):
    runs = []
    for trainer_class in (GRPOTrainer, Widened):
        model = tmp_path / "policy"
        policy.save_pretrained(model)
        model = str(model) if "beta" in changes else copy_of(policy, tokenizer)
        runs.append(stock(model, tokenizer, settings(tmp_path, 5, **changes), trainer_class))
        runs[-1].train()
    same(*runs)
    assert moved(runs[0], policy)


# GRPO as a special case of ours; with TRL's own sampling, or two streams of chance would be compared

OFF = {"shared_rollout": False, "packed_update": False}

@pytest.mark.parametrize("changes", [{}, {"micro_batch": 4}, {"micro_batch": 2, "num_iterations": 2},
                                     {"loss_type": "dapo"}], ids=str)
def test_our_grpo_is_trls_own(policy, tokenizer, tmp_path, changes):
    theirs = stock(copy_of(policy, tokenizer), tokenizer, settings(tmp_path, 6, **changes))
    theirs.train()
    ours = trainer(StepGRPOTrainer, copy_of(policy, tokenizer), tokenizer, settings(tmp_path, 6, **changes), "grpo", **OFF)
    ours.train()
    same(theirs, ours, ("loss", "grad_norm", "entropy", "reward", "reward_std", "completions/mean_length"))
    assert moved(ours, policy) and len({row.get("reward") for row in rows(ours)}) > 2


# Unanimous groups are replaced

class CountingTrainer(StepGRPOTrainer):
    "Counts the unanimous groups when rewards are given."
    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        assert prompts == [row["prompt"] for row in inputs]
        right = self.tiers_correct(inputs, completion_ids_list).view(-1, self.num_generations)
        self.unanimous = getattr(self, "unanimous", 0) + (right == right[:, :1]).all(1).sum().item()
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)


def test_other_prompts_replace_unanimous_groups(policy, tokenizer, tmp_path):
    config = {"steps": 4, "lr": 1e-9}  # the policy stays as it is
    plain, filled = (trainer(CountingTrainer, copy_of(policy, tokenizer), tokenizer, settings(tmp_path, **config), dynamic=True,
                             refill=rounds) for rounds in (0, 3))
    for run in (plain, filled): run.train()
    prompted = [row["prompts_asked"] for row in rows(filled)]
    assert 0 <= filled.unanimous < plain.unanimous and min(prompted) >= 3 and max(prompted) > 3
    assert all(row["num_tokens"] for row in rows(filled)) and "prompts_asked" not in rows(plain)[0]
    with pytest.raises(BookError, match="set engine = shared"):
        trainer(CountingTrainer, copy_of(policy, tokenizer), tokenizer, settings(tmp_path), dynamic=True, refill=1,
                shared_rollout=False)


# Step advantages reach the loss

def owners(ids, tokenizer):
    "The step of each token, from growing prefixes of the text: the step of its last character but one space."
    stops = [len(tokenizer.decode(ids[:i + 1])) for i in range(len(ids))]
    text = tokenizer.decode(ids)
    spans = parse(text).spans
    steps = []
    for start, end in zip([0, *stops], stops, strict=False):
        place = next((i for i in range(start, end) if not text[i].isspace()), start)
        steps.append(max((k for k, (begin, _) in spans.items() if begin <= place), default=min(spans, default=0)))
    return steps


def by_hand(batch, inputs, tokenizer, credit, gamma=1.0):
    "The advantages of a generation batch from nothing but its ids."
    mask = batch["completion_mask"].bool()
    ids = [response[kept].tolist() for response, kept in zip(batch["completion_ids"], mask, strict=True)]
    scores = [step_rewards(tokenizer.decode(response, skip_special_tokens=True), TRUTHS[row["row"]])
              for response, row in zip(ids, inputs, strict=True)]
    steps = advantage(torch.tensor(scores).view(-1, 4, 5), credit, gamma).flatten(0, 1)
    expected = torch.zeros(mask.shape)
    for i, response in enumerate(ids): expected[i, :len(response)] = steps[i][torch.tensor(owners(response, tokenizer))]
    if credit == "lambda_grpo":  # a token's share is divided among those of its group that agree up to it
        for i, response in enumerate(ids):
            group = ids[i - i % 4:][:4]
            for t in range(len(response)): expected[i, t] /= sum(other[:t + 1] == response[:t + 1] for other in group)
    return expected


@pytest.mark.parametrize("credit", CREDIT)
def test_step_advantages_are_those_of_the_tokens(policy, tokenizer, tmp_path, credit):
    run = trainer(RecordingTrainer, copy_of(policy, tokenizer), tokenizer, settings(tmp_path, 4, temperature=1.2), credit)
    run.train()
    varied = 0
    for inputs, batch in run.batches:
        actual = batch["advantages"]
        assert actual.shape == batch["completion_mask"].shape
        assert (actual[batch["completion_mask"] == 0] == 0).all()
        torch.testing.assert_close(actual, by_hand(batch, inputs, tokenizer, credit), atol=1e-6, rtol=0)
        varied += (actual.std(1) > 0.01).sum()
    assert len(run.batches) == 4 and (credit.startswith("grpo") or varied > 4)


@pytest.mark.parametrize("micro", [0, 4])
def test_the_loss_uses_them(policy, tokenizer, tmp_path, micro):
    "One step of plain gradient descent equals the policy gradient written out."
    config = settings(tmp_path, 1, optim="sgd", lr=1.0, micro_batch=micro, max_grad_norm=0.0,
                      lr_scheduler_type="constant", warmup_steps=0)
    run = trainer(RecordingTrainer, copy_of(policy, tokenizer), tokenizer, config)
    run.train()
    (inputs, batch), = run.batches
    assert (batch["advantages"].std(1) > 0.1).any()
    model = copy_of(policy, tokenizer).train()
    ids, length = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1), batch["completion_ids"].shape[1]
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    logits = model(input_ids=ids, attention_mask=attention_mask).logits[:, -length - 1:-1] / config.temperature
    logps = logits.log_softmax(-1).gather(2, batch["completion_ids"].unsqueeze(2)).squeeze(2)
    mask = batch["completion_mask"]
    loss = -((logps * by_hand(batch, inputs, tokenizer, "srpo_return") * mask).sum(1) / mask.sum(1)).mean()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None: parameter -= parameter.grad
    assert (weights(model) - weights(run.model)).abs().max() < 1e-6 and moved(run, policy)


# Whatever the policy says

MALFORMED = {"nothing": "", "no tags": "boots boots boots", "repeated": "<tier> 4 <tier> 4 <query> boots",
             "cut": "<query> boots ; color red <item> boots ; col", "bytes": b"\xf0\x9f", "a tag": "<tier>",
             "doubled": "<query> boots ; color red <query> <item> boots ; color red"}


@pytest.mark.parametrize("company", ["alone", "beside a right answer"])
@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_responses_earn_nothing_and_break_nothing(policy, tokenizer, tmp_path, case, company):
    text = MALFORMED[case]
    ids = tokenizer.convert_tokens_to_ids(["ð", "Ł"]) if isinstance(text, bytes) else tokenizer(text)["input_ids"]
    if case != "cut": ids = ids + [tokenizer.eos_token_id]
    run = trainer(RecordingTrainer, copy_of(policy, tokenizer), tokenizer, settings(tmp_path, 3))
    right = tokenizer("<query> boots ; color red <item> boots ; color red <category> same <attributes> color match "
                  "<tier> 4")

    def generate(prompt_ids, *rest, **options):
        answers = [list(ids) for _ in prompt_ids]
        if company != "alone": answers[::4] = [right["input_ids"] + [tokenizer.eos_token_id]] * len(answers[::4])
        return answers, None

    run._generate_single_turn = generate
    run.train()
    for inputs, batch in run.batches:
        assert batch["advantages"].isfinite().all()
        if company == "alone": assert (batch["advantages"] == 0).all()
        torch.testing.assert_close(batch["advantages"], by_hand(batch, inputs, tokenizer, "srpo_return"), atol=1e-6, rtol=0)
    for row in rows(run):
        assert all(math.isfinite(row[name]) for name in ("loss", "grad_norm", "advantage_std", "all_steps"))
    if company == "alone":
        assert all(row["well_formed"] == row["final_accuracy"] == row["all_steps"] == 0 for row in rows(run))
    assert weights(run.model).isfinite().all()


def test_the_stated_reward_of_each_step_when_some_are_malformed():
    red = next(truth for truth in TRUTHS if truth.tier == 4 and str(truth.wishes[0]) == "color red"
               and truth.item_category == "boots")
    text = "<query> boots ; color red <item> mug <tier> 4 <item> boots ; color red <attributes> color match"
    assert step_rewards(text, red) == [1, 0, 0, 0, 0]  # opened twice: lost; too late: lost, with what it was put into


# An epoch's end, one step missing, or truth of the tier alone

@pytest.mark.parametrize("order", ["answer_first", "label_only"])
def test_other_orders_log_rows_that_a_record_can_hold(policy, tokenizer, tmp_path, order):
    run, log = train_rl(copy_of(policy, tokenizer), tokenizer, PAIRS, settings(tmp_path, 3), order=order)
    for row in curve_rows(log): assert all(isinstance(value, (int, float)) for value in row.values())
    assert len(curve_rows(log)) == 3


def test_tiers_alone_are_enough_truth(policy, tokenizer, tmp_path):
    known = [deepcopy(pair) for pair in PAIRS]
    for pair in known: object.__setattr__(pair, "truth", type(pair.truth)(tier=pair.truth.tier))
    run, log = train_rl(copy_of(policy, tokenizer), tokenizer, known, settings(tmp_path, 3))
    assert all("step_accuracy_1" not in row and row["final_accuracy"] >= 0 for row in curve_rows(log))
    assert weights(run.model).isfinite().all()


# One committed trajectory

INVARIANT = Path(__file__).parent / "invariants/srpo.json"
TRACED = ("loss", "grad_norm", "entropy", "advantage_std")


def trajectory(tokenizer, folder, **changes):
    "Six SRPO steps, two on each of three generation batches; what is said is given, so that no draw can differ."
    config = settings(folder, 6, num_iterations=2, **changes)
    run = trainer(ScriptedTrainer, new_model(tokenizer, 32, 1, 2), tokenizer, config)
    run.script = scripted_responses(tokenizer)
    run.train()
    return [{name: row[name] for name in TRACED if name in row} for row in rows(run)]


def close(results, expected):
    assert len(results) == len(expected) == 6
    for step, (left, right) in enumerate(zip(results, expected, strict=True)):
        for name in right: assert left[name] == pytest.approx(right[name], rel=1e-3, abs=1e-6), (step + 1, name)


def test_srpo_takes_the_committed_path(tokenizer, tmp_path):
    close(trajectory(tokenizer, tmp_path), json.loads(INVARIANT.read_text()))


@pytest.mark.parametrize("micro", [6, 4, 1])
def test_small_batches_accumulated_are_one_large_batch(tokenizer, tmp_path, micro):
    close(trajectory(tokenizer, tmp_path, micro_batch=micro), json.loads(INVARIANT.read_text()))


if __name__ == "__main__":  # writes the path anew, after a change that was meant
    import tempfile

    from small import make_tokenizer
    INVARIANT.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder: path = trajectory(make_tokenizer(), folder)
    INVARIANT.write_text(json.dumps(path, indent=1) + "\n")
