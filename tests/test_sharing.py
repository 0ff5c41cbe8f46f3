"""The cheap step and TRL's own: one history, wherever both can take the same responses."""
import pytest
import torch
from small import PAIRS, RecordingTrainer, copy_of, moved, rows, settings, trainer, weights
from transformers import AutoModelForCausalLM, MistralConfig, Qwen3MoeConfig, set_seed
from trl import GRPOTrainer

from she_nb.learning.trainers import rl_dataset
from she_nb.policy.models import new_model
from she_nb.policy.sharing import SharedPromptTrainer

NAMES = ("loss", "grad_norm", "entropy", "reward", "all_steps", "advantage_std")


def history(model, tokenizer, folder, steps=4, packed=True, **changes):
    options = {name: changes.pop(name) for name in ["shared_rollout"] if name in changes}
    run = trainer(RecordingTrainer, model, tokenizer, settings(folder, steps, **changes), packed_update=packed, **options)
    run.train()
    return run


def same(one, other, loose=1e-4, names=NAMES):
    for (_, left), (_, right) in zip(one.batches, other.batches, strict=True):
        assert torch.equal(left["completion_ids"], right["completion_ids"])
        torch.testing.assert_close(left["advantages"], right["advantages"], atol=1e-6, rtol=0)
    for left, right in zip(rows(one), rows(other), strict=True):
        for name in names:
            assert left.get(name, 0) == pytest.approx(right.get(name, 0), rel=1e-3, abs=loose), (left["step"], name)
    assert (weights(one.model) - weights(other.model)).abs().max() < loose


def test_thirty_steps_are_the_same_thirty_steps(policy, tokenizer, tmp_path):
    "In double precision, for in single what is rounded grows step by step, until after some twenty a token falls otherwise."
    packed, padded = (history(copy_of(policy, tokenizer).double(), tokenizer, tmp_path, 30, packed) for packed in (True, False))
    same(packed, padded)
    assert moved(packed, policy) and len({row["reward"] for row in rows(packed)}) > 3


SETTINGS = ({"micro_batch": 4}, {"micro_batch": 2}, {"num_iterations": 3}, {"beta": 0.1},
            {"loss_type": "dapo"}, {"mask_truncated_completions": True, "max_new_tokens": 12}, {"gradient_checkpointing": True})


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_every_setting(policy, tokenizer, tmp_path, changes):
    policy.save_pretrained(tmp_path / "policy")
    def start(): return str(tmp_path / "policy") if "beta" in changes else copy_of(policy, tokenizer)

    skipped = {"entropy"} if "micro_batch" in changes else set()  # TRL logs the mean of the micro-batches' means
    same(*(history(start(), tokenizer, tmp_path, packed=packed, **dict(changes)) for packed in (True, False)),
         names=[name for name in NAMES if name not in skipped])


def experts(tokenizer):
    set_seed(5)
    shape = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=2, head_dim=16, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return AutoModelForCausalLM.from_config(Qwen3MoeConfig(
        **shape, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, output_router_logits=True))


def test_a_mixture_of_experts_with_its_balancing_loss(tokenizer, tmp_path):
    packed, padded = (history(experts(tokenizer), tokenizer, tmp_path, packed=packed, max_new_tokens=16, prompts_per_step=2)
                      for packed in (True, False))
    same(packed, padded)
    for left, right in zip(rows(packed), rows(padded), strict=True):
        assert left["aux_loss"] == pytest.approx(right["aux_loss"], rel=1e-5)
    assert all(row["aux_loss"] > 0 for row in rows(packed))


def test_windows_are_left_to_the_library(tokenizer, tmp_path):
    "A model that our masks would overrule trains by TRL's own path."
    shape = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                 num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
                 sliding_window=8)
    set_seed(0)
    model = AutoModelForCausalLM.from_config(MistralConfig(**shape))
    run = history(model, tokenizer, tmp_path, 2, max_new_tokens=8)
    assert not run.can_share(True)
    assert len(run.batches) == 2 and weights(run.model).isfinite().all()


def test_half_precision_stays_close(policy, tokenizer, tmp_path):
    def outcome(packed):
        run = history(copy_of(policy, tokenizer).to(torch.bfloat16), tokenizer, tmp_path, 1, packed, bf16=True)
        return rows(run)[0]
    packed, padded = outcome(True), outcome(False)
    for name in ("grad_norm", "entropy"): assert packed[name] == pytest.approx(padded[name], rel=0.03), name


def test_rollouts_follow_the_seed_and_nothing_else(policy, tokenizer, tmp_path):
    runs = [history(copy_of(policy, tokenizer), tokenizer, tmp_path, 3, lr=0.0, seed=seed, micro_batch=micro)
            for seed, micro in ((1, 0), (1, 4), (2, 0))]
    responses = [[batch["completion_ids"].tolist() for _, batch in run.batches] for run in runs]
    assert responses[0] == responses[1] != responses[2]
    inputs = [run.batches[0][0] for run in runs]
    assert inputs[0] == inputs[1]
    assert len({str(batch) for batch in responses[0]}) == 3   # no two steps draw alike


def remainder(completion_ids, **options): return [float(sum(ids) % 7) for ids in completion_ids]


def test_it_serves_without_step_credit(policy, tokenizer, tmp_path):
    "Any GRPO on TRL becomes cheaper by changing the class."
    logs = []
    for trainer_class in (SharedPromptTrainer, GRPOTrainer):
        set_seed(0)
        run = trainer_class(copy_of(policy, tokenizer), args=settings(tmp_path, 3), train_dataset=rl_dataset(PAIRS),
                            processing_class=tokenizer, reward_funcs=[remainder])
        run.train()
        logs.append(rows(run))
    assert all(len(run) == 3 and any(row["reward_std"] > 0 and row["grad_norm"] > 0 for row in run) for run in logs)


def test_the_model_can_be_new(tokenizer, tmp_path):
    "Nothing of a trained judge is needed: random weights never end, so every response is cut at the limit."
    run = history(new_model(tokenizer, 32, 1, 2), tokenizer, tmp_path, 2, max_new_tokens=9)
    assert {len(ids) for _, batch in run.batches for ids in batch["completion_ids"].tolist()} == {9}
