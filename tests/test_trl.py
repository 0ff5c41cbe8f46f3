"""What we rely on in TRL's GRPOTrainer, and what step credit owes it: equal numbers wherever both should agree."""
import json
import math
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from small import PAIRS, TRUTHS, Kept, Told, fresh, moved, rows, scripts, settings, trainer, weights
from transformers import set_seed
from trl import GRPOTrainer
from two_processes import run as run_told

from she_nb.learning.advantage import CREDIT, advantage
from she_nb.learning.trainers import StepGRPOTrainer, curve_rows, rl_dataset, train_rl
from she_nb.policy.models import new_model
from she_nb.task import BookError, parse
from she_nb.verifier import step_rewards

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo")


def right_tier(completions, row, **kwargs):
    "The outcome as a stock reward function computes it, from TRL's own text."
    return [step_rewards(text, TRUTHS[i])[4] for text, i in zip(completions, row, strict=True)]


def stock(model, words, config, kind=GRPOTrainer):
    set_seed(config.seed)
    return kind(model, reward_funcs=right_tier, args=config, train_dataset=rl_dataset(PAIRS), processing_class=words)


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
def test_trl_still_takes_an_advantage_for_every_token(policy, words, tmp_path, loss):
    "Fails on the day that TRL drops (B, T) from one of its losses."
    run = stock(fresh(policy, words), words, settings(tmp_path, loss_type=loss))
    batch = run._prepare_inputs([row for row in run.train_dataset.select(range(3)) for _ in range(4)])
    batch["advantages"] = torch.linspace(-1, 1, len(batch["advantages"]))
    ids, seen = (torch.cat([batch[f"prompt_{name}"], batch[f"completion_{name}"]], 1) for name in ("ids", "mask"))
    length = batch["completion_ids"].shape[1]
    said = run._get_per_token_logps_and_entropies(run.model, ids, seen, length)[0]
    batch["old_per_token_logps"] = said.detach() + 0.1
    run.current_gradient_accumulation_steps = 1
    found = []
    for wide in (False, True):
        one = dict(batch)
        if wide: one["advantages"] = batch["advantages"].unsqueeze(1).expand(-1, length)
        run.model.zero_grad()
        value = run.compute_loss(run.model, one)
        value.backward()
        found.append((value.item(), torch.cat([each.grad.flatten() for each in run.model.parameters()])))
    assert abs(found[0][0] - found[1][0]) < 1e-6 and (found[0][1] - found[1][1]).abs().max() < 1e-6
    assert found[0][1].abs().max() > 1e-3  # and the batch teaches something


@pytest.mark.parametrize("changes", [{}, {"num_iterations": 2}, {"micro_batch": 4}, {"beta": 0.1}], ids=str)
def test_constant_token_advantages_train_like_scalar_ones(policy, words, tmp_path, changes):
    runs = []
    for kind in (GRPOTrainer, Widened):
        model = tmp_path / "policy"
        policy.save_pretrained(model)
        model = str(model) if "beta" in changes else fresh(policy, words)
        runs.append(stock(model, words, settings(tmp_path, 5, **changes), kind))
        runs[-1].train()
    same(*runs)
    assert moved(runs[0], policy)


# GRPO as a special case of ours; with TRL's own sampling, or two streams of chance would be compared

OFF = {"shared_rollout": False, "packed_update": False}

@pytest.mark.parametrize("changes", [{}, {"micro_batch": 4}, {"micro_batch": 2, "num_iterations": 2},
                                     {"loss_type": "dapo"}], ids=str)
def test_our_grpo_is_trls_own(policy, words, tmp_path, changes):
    theirs = stock(fresh(policy, words), words, settings(tmp_path, 6, **changes))
    theirs.train()
    ours = trainer(StepGRPOTrainer, fresh(policy, words), words, settings(tmp_path, 6, **changes), "grpo", **OFF)
    ours.train()
    same(theirs, ours, ("loss", "grad_norm", "entropy", "reward", "reward_std", "completions/mean_length"))
    assert moved(ours, policy) and len({row.get("reward") for row in rows(ours)}) > 2


# Groups that agree make room

class Asked(StepGRPOTrainer):
    "Counts the groups whose answers agree when rewards are given."
    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        assert prompts == [row["prompt"] for row in inputs]
        right = self.answers_right(inputs, completion_ids_list).view(-1, self.num_generations)
        self.mute = getattr(self, "mute", 0) + (right == right[:, :1]).all(1).sum().item()
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)


def test_prompts_whose_answers_agree_make_room_for_others(policy, words, tmp_path):
    config = {"steps": 4, "lr": 1e-9}  # the policy stays as it is
    plain, filled = (trainer(Asked, fresh(policy, words), words, settings(tmp_path, **config), dynamic=True, refill=rounds)
                     for rounds in (0, 3))
    for run in (plain, filled): run.train()
    asked = [row["prompts_asked"] for row in rows(filled)]
    assert 0 <= filled.mute < plain.mute and min(asked) >= 3 and max(asked) > 3
    assert all(row["num_tokens"] for row in rows(filled)) and "prompts_asked" not in rows(plain)[0]
    with pytest.raises(BookError, match="set engine = shared"):
        trainer(Asked, fresh(policy, words), words, settings(tmp_path), dynamic=True, refill=1, shared_rollout=False)


# Step advantages reach the loss

def owners(ids, words):
    "Who wrote each token, told again from growing prefixes of the text: the step of its last character but one space."
    ends = [len(words.decode(ids[:i + 1])) for i in range(len(ids))]
    text = words.decode(ids)
    spans = parse(text).spans
    found = []
    for start, end in zip([0, *ends], ends, strict=False):
        place = next((i for i in range(start, end) if not text[i].isspace()), start)
        found.append(max((k for k, (begin, _) in spans.items() if begin <= place), default=min(spans, default=0)))
    return found


def by_hand(batch, inputs, words, credit, gamma=1.0):
    "The advantages of a generation batch from nothing but its ids."
    mask = batch["completion_mask"].bool()
    ids = [each[kept].tolist() for each, kept in zip(batch["completion_ids"], mask, strict=True)]
    scores = [step_rewards(words.decode(each, skip_special_tokens=True), TRUTHS[row["row"]])
              for each, row in zip(ids, inputs, strict=True)]
    steps = advantage(torch.tensor(scores).view(-1, 4, 5), credit, gamma).flatten(0, 1)
    expected = torch.zeros(mask.shape)
    for i, each in enumerate(ids): expected[i, :len(each)] = steps[i][torch.tensor(owners(each, words))]
    if credit == "lambda_grpo":  # a token's share is divided among those of its group that agree up to it
        for i, each in enumerate(ids):
            group = ids[i - i % 4:][:4]
            for t in range(len(each)): expected[i, t] /= sum(other[:t + 1] == each[:t + 1] for other in group)
    return expected


@pytest.mark.parametrize("credit", CREDIT)
def test_step_advantages_are_those_of_the_tokens(policy, words, tmp_path, credit):
    run = trainer(Kept, fresh(policy, words), words, settings(tmp_path, 4, temperature=1.2), credit)
    run.train()
    varied = 0
    for inputs, batch in run.batches:
        made = batch["advantages"]
        assert made.shape == batch["completion_mask"].shape
        assert (made[batch["completion_mask"] == 0] == 0).all()
        torch.testing.assert_close(made, by_hand(batch, inputs, words, credit), atol=1e-6, rtol=0)
        varied += (made.std(1) > 0.01).sum()
    assert len(run.batches) == 4 and (credit.startswith("grpo") or varied > 4)


@pytest.mark.parametrize("micro", [0, 4])
def test_the_loss_uses_them(policy, words, tmp_path, micro):
    "One step of plain gradient descent equals the policy gradient written out."
    config = settings(tmp_path, 1, optim="sgd", lr=1.0, micro_batch=micro, max_grad_norm=0.0,
                      lr_scheduler_type="constant", warmup_steps=0)
    run = trainer(Kept, fresh(policy, words), words, config)
    run.train()
    (inputs, batch), = run.batches
    assert (batch["advantages"].std(1) > 0.1).any()
    model = fresh(policy, words).train()
    ids, length = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1), batch["completion_ids"].shape[1]
    seen = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    logits = model(input_ids=ids, attention_mask=seen).logits[:, -length - 1:-1] / config.temperature
    logps = logits.log_softmax(-1).gather(2, batch["completion_ids"].unsqueeze(2)).squeeze(2)
    mask = batch["completion_mask"]
    loss = -((logps * by_hand(batch, inputs, words, "srpo_return") * mask).sum(1) / mask.sum(1)).mean()
    loss.backward()
    with torch.no_grad():
        for each in model.parameters():
            if each.grad is not None: each -= each.grad
    assert (weights(model) - weights(run.model)).abs().max() < 1e-6 and moved(run, policy)


# Whatever the policy says

MALFORMED = {"nothing": "", "no tags": "boots boots boots", "repeated": "<tier> 4 <tier> 4 <query> boots",
             "cut": "<query> boots ; color red <item> boots ; col", "bytes": b"\xf0\x9f", "a tag": "<tier>",
             "doubled": "<query> boots ; color red <query> <item> boots ; color red"}


@pytest.mark.parametrize("company", ["alone", "beside a right answer"])
@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_responses_earn_nothing_and_break_nothing(policy, words, tmp_path, case, company):
    said = MALFORMED[case]
    ids = words.convert_tokens_to_ids(["ð", "Ł"]) if isinstance(said, bytes) else words(said)["input_ids"]
    if case != "cut": ids = ids + [words.eos_token_id]
    run = trainer(Kept, fresh(policy, words), words, settings(tmp_path, 3))
    right = words("<query> boots ; color red <item> boots ; color red <category> same <attributes> color match "
                  "<tier> 4")

    def generate(prompt_ids, *rest, **more):
        answers = [list(ids) for _ in prompt_ids]
        if company != "alone": answers[::4] = [right["input_ids"] + [words.eos_token_id]] * len(answers[::4])
        return answers, None

    run._generate_single_turn = generate
    run.train()
    for inputs, batch in run.batches:
        assert batch["advantages"].isfinite().all()
        if company == "alone": assert (batch["advantages"] == 0).all()
        torch.testing.assert_close(batch["advantages"], by_hand(batch, inputs, words, "srpo_return"), atol=1e-6, rtol=0)
    for row in rows(run):
        assert all(math.isfinite(row[name]) for name in ("loss", "grad_norm", "advantage_std", "all_steps"))
    if company == "alone":
        assert all(row["well_formed"] == row["final_accuracy"] == row["all_steps"] == 0 for row in rows(run))
    assert weights(run.model).isfinite().all()


def test_the_stated_reward_of_each_step_when_some_are_malformed():
    red = next(truth for truth in TRUTHS if truth.tier == 4 and str(truth.wishes[0]) == "color red"
               and truth.item_category == "boots")
    said = "<query> boots ; color red <item> mug <tier> 4 <item> boots ; color red <attributes> color match"
    assert step_rewards(said, red) == [1, 0, 0, 0, 0]  # opened twice: lost; too late: lost, with what it was put into


# An epoch's end, one step missing, or truth of the tier alone

@pytest.mark.parametrize("order", ["answer_first", "label_only"])
def test_other_orders_log_rows_that_a_record_can_hold(policy, words, tmp_path, order):
    run, log = train_rl(fresh(policy, words), words, PAIRS, settings(tmp_path, 3), order=order)
    for row in curve_rows(log): assert all(isinstance(value, (int, float)) for value in row.values())
    assert len(curve_rows(log)) == 3


def test_tiers_alone_are_enough_truth(policy, words, tmp_path):
    known = [deepcopy(pair) for pair in PAIRS]
    for pair in known: object.__setattr__(pair, "truth", type(pair.truth)(tier=pair.truth.tier))
    run, log = train_rl(fresh(policy, words), words, known, settings(tmp_path, 3))
    assert all("step_accuracy_1" not in row and row["final_accuracy"] >= 0 for row in curve_rows(log))
    assert weights(run.model).isfinite().all()


# Two processes

@pytest.fixture(scope="session")
def together(tmp_path_factory):
    "Five steps on twelve responses in groups of four: in one process, and six in each of two; a group straddles."
    out = tmp_path_factory.mktemp("processes")
    script, root = Path(__file__).parent / "two_processes.py", Path(__file__).parent.parent
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run([*launch, str(script), str(out)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    run_told(out, "one", 12, 12)
    run_told(out, "alone", 12, 12, kind=Kept)
    return {path.stem: torch.load(path, weights_only=True) for path in out.glob("*.pt")}


@pytest.mark.parametrize("micro", [6, 3])
def test_groups_that_straddle_two_processes_have_the_advantages_of_one(together, micro):
    one, ranks = together["one-0"], [together[f"two{micro}-{rank}"] for rank in (0, 1)]
    assert one["processes"] == 1 and ranks[0]["processes"] == 2
    seen = 0
    for step, whole in enumerate(one["batches"]):
        parts = [rank["batches"][step] for rank in ranks]
        assert parts[0]["row"] + parts[1]["row"] == whole["row"] and parts[0]["row"][-1] == parts[1]["row"][0]
        place = 0
        for part in parts:
            of_part = (part[name] for name in ("completion_ids", "completion_mask", "advantages"))
            for ids, mask, made in zip(*of_part, strict=True):
                length = int(mask.sum())
                assert ids[:length].tolist() == whole["completion_ids"][place][:length].tolist()
                torch.testing.assert_close(made[:length], whole["advantages"][place][:length], atol=1e-6, rtol=0)
                assert whole["completion_mask"][place].sum() == length and not made[length:].any()
                seen += bool(made.std() > 0.1)
                place += 1
    assert seen > 20 and place == 12


@pytest.mark.parametrize("micro", [6, 3])
def test_two_processes_learn_what_one_learns(together, micro):
    one, ranks = together["one-0"], [together[f"two{micro}-{rank}"] for rank in (0, 1)]
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])
    assert (ranks[0]["weights"] - one["weights"]).abs().max() < 1e-6
    names = ("reward", "all_steps", "well_formed", "advantage_mean", "advantage_std", "grad_norm", "loss")
    for left, right in zip(one["rows"], ranks[0]["rows"], strict=True):
        for name in names: assert left[name] == pytest.approx(right[name], rel=1e-4, abs=1e-6), name


def test_two_processes_say_what_one_says(together):
    one, ranks = together["alone-0"], [together[f"said-{rank}"] for rank in (0, 1)]
    whole, halves = one["batches"][0], [rank["batches"][0] for rank in ranks]
    said = [ids[mask.bool()].tolist() for part in halves for ids, mask in
            zip(part["completion_ids"], part["completion_mask"], strict=True)]
    assert said == [ids[mask.bool()].tolist() for ids, mask in
                    zip(whole["completion_ids"], whole["completion_mask"], strict=True)]
    assert len({str(ids) for ids in said}) > 6


# One committed trajectory

INVARIANT = Path(__file__).parent / "invariants/srpo.json"
TRACED = ("loss", "grad_norm", "entropy", "advantage_std")


def trajectory(words, folder, **changes):
    "Six SRPO steps, two on each of three generation batches; what is said is given, so that no draw can differ."
    config = settings(folder, 6, num_iterations=2, **changes)
    run = trainer(Told, new_model(words, 32, 1, 2), words, config)
    run.script = scripts(words)
    run.train()
    return [{name: row[name] for name in TRACED if name in row} for row in rows(run)]


def close(found, expected):
    assert len(found) == len(expected) == 6
    for step, (left, right) in enumerate(zip(found, expected, strict=True)):
        for name in right: assert left[name] == pytest.approx(right[name], rel=1e-3, abs=1e-6), (step + 1, name)


def test_srpo_takes_the_committed_path(words, tmp_path):
    close(trajectory(words, tmp_path), json.loads(INVARIANT.read_text()))


@pytest.mark.parametrize("micro", [6, 4, 1])
def test_small_batches_accumulated_are_one_large_batch(words, tmp_path, micro):
    close(trajectory(words, tmp_path, micro_batch=micro), json.loads(INVARIANT.read_text()))


if __name__ == "__main__":  # writes the path anew, after a change that was meant
    import tempfile

    from small import tokenizer
    INVARIANT.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as made: path = trajectory(tokenizer(), made)
    INVARIANT.write_text(json.dumps(path, indent=1) + "\n")
