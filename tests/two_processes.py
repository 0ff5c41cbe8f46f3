"Run by test_trl.py, alone and under torchrun: short trainings whose responses are written beforehand."
import sys
from pathlib import Path

import torch
from small import RecordingTrainer, ScriptedTrainer, make_tokenizer, rows, scripted_responses, settings, trainer, weights

from she_nb.policy.models import new_model


class ScriptedRecordingTrainer(ScriptedTrainer, RecordingTrainer): pass


def run(out, name, each, micro, credit="srpo_return", trainer_class=ScriptedRecordingTrainer):
    "Train on `each` responses in every process, `micro` in a forward pass; leave batches, log and weights."
    tokenizer = make_tokenizer()
    config = settings(out / name, 5, per_device_train_batch_size=micro, gradient_accumulation_steps=each // micro,
                      optim="sgd", lr=0.5)
    scripted = trainer(trainer_class, new_model(tokenizer, 32, 1, 2), tokenizer, config, credit)
    scripted.script = scripted_responses(tokenizer)
    scripted.train()
    batches = [{name: batch[name] for name in ("completion_ids", "completion_mask", "advantages")} | {
             "row": [each["row"] for each in inputs]} for inputs, batch in scripted.batches]
    model = scripted.accelerator.unwrap_model(scripted.model)
    result = {"batches": batches, "rows": rows(scripted), "weights": weights(model),
             "processes": scripted.accelerator.num_processes}
    torch.save(result, out / f"{name}-{scripted.accelerator.process_index}.pt")


if __name__ == "__main__":
    for micro in (6, 3): run(Path(sys.argv[1]), f"two{micro}", 6, micro)
    run(Path(sys.argv[1]), "said", 6, 6, trainer_class=RecordingTrainer)
