"Training with vLLM beside the trainer: do the weights follow? Part of `make test-vllm`."
from parts import distance, make_policy, note
from small import RecordingTrainer, moved, rows, settings, trainer

from she_nb.policy.models import load_policy
from she_nb.policy.synced import APART, synced_trainer, vllm_options


def test_colocated_training_samples_from_the_weights_that_it_trains(tmp_path):
    folder = make_policy(tmp_path / "policy")
    before, tokenizer = load_policy(folder)
    config = settings(tmp_path, steps=4, vllm_max_model_length=1024, **vllm_options())
    run = synced_trainer(lambda: trainer(RecordingTrainer, str(folder), tokenizer, config))
    run.train()
    ratios = [batch["importance_sampling_ratio"][batch["completion_mask"].bool()] for _, batch in run.batches]
    apart = [float((ratio - 1).abs().max()) for ratio in ratios]
    drawn = [batch["completion_ids"] for _, batch in run.batches]
    inputs, last = run.batches[-1]
    ids = [tokenizer(row["prompt"], add_special_tokens=False)["input_ids"] for row in inputs][:4]
    responses = [row[mask.bool()].tolist() for row, mask in zip(last["completion_ids"], last["completion_mask"], strict=True)][:4]
    logps = [row[mask.bool()].tolist() for row, mask in
             zip(last["sampling_per_token_logps"], last["completion_mask"], strict=True)][:4]
    stale = distance(before, list(zip(ids, responses, logps, strict=True)), config.temperature)
    note("colocated", steps=len(ratios), tokens=sum(map(len, ratios)), largest_ratio_from_one=apart,
         after_first_sync=run.vllm_generation.difference, from_the_first_weights_at_the_end=stale,
         rewards=[row["reward"] for row in rows(run) if "reward" in row],
         different_responses=[len(set(map(tuple, each.tolist()))) for each in drawn])
    assert moved(run, before.train()) and max(apart) < 0.01
    assert run.vllm_generation.difference < 1e-3 and stale > APART   # where an engine left behind would be
