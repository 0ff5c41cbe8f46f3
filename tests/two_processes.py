"Run by test_trl.py, alone and under torchrun: short trainings whose responses are written beforehand."
import sys
from pathlib import Path

import torch
from small import Kept, Told, rows, scripts, settings, tokenizer, trainer, weights

from she_nb.policy.models import new_model


class ToldAndKept(Told, Kept): pass


def run(out, name, each, micro, credit="srpo_return", kind=ToldAndKept):
    "Train on `each` responses in every process, `micro` in a forward pass; leave batches, log and weights."
    words = tokenizer()
    config = settings(out / name, 5, per_device_train_batch_size=micro, gradient_accumulation_steps=each // micro,
                      optim="sgd", lr=0.5)
    told = trainer(kind, new_model(words, 32, 1, 2), words, config, credit)
    told.script = scripts(words)
    told.train()
    kept = [{name: batch[name] for name in ("completion_ids", "completion_mask", "advantages")} | {
             "row": [each["row"] for each in inputs]} for inputs, batch in told.batches]
    model = told.accelerator.unwrap_model(told.model)
    found = {"batches": kept, "rows": rows(told), "weights": weights(model),
             "processes": told.accelerator.num_processes}
    torch.save(found, out / f"{name}-{told.accelerator.process_index}.pt")


if __name__ == "__main__":
    for micro in (6, 3): run(Path(sys.argv[1]), f"two{micro}", 6, micro)
    run(Path(sys.argv[1]), "said", 6, 6, kind=Kept)
