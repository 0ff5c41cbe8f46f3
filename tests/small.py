"A judge small enough for contracts: twelve written pairs, 400 ids, one layer, trainers with scripted responses."
import random
from dataclasses import fields

import torch
from transformers import set_seed
from trl import GRPOConfig

from she_nb.learning.sft import sft_dataset, train_sft
from she_nb.learning.trainers import StepGRPOTrainer, rl_config, rl_dataset
from she_nb.policy.models import corpus, new_model, train_tokenizer
from she_nb.policy.sharing import as_rows
from she_nb.task import Pair, StepTruth, Wish, render, tier_of

COLORS, THINGS = ("red", "blue"), ("boots", "mug", "lamp")


def pair(number, wanted, color, offered, shown):
    relation = "same" if wanted == offered else "unrelated"
    verdicts = {"color": "unknown" if shown is None else "match" if shown == color else "contradicted"}
    truth = StepTruth(wanted, (Wish("color", color),), offered, {"color": shown or "unknown"}, relation, verdicts,
                      tier_of(relation, verdicts))
    return Pair(str(number), f"{color} {wanted}", f"{shown or ''} {offered}", "plain", "seed", str(number), truth)


PAIRS = [pair(i, THINGS[i % 3], COLORS[i % 2], THINGS[(i + i // 6) % 3], (*COLORS, None)[i // 2 % 3])
         for i in range(12)]
TRUTHS = [each.truth for each in PAIRS]
CHAINS = TRUTHS[1:] + TRUTHS[:1]  # of another pair: a teacher who is often wrong


def make_tokenizer(): return train_tokenizer(corpus(PAIRS, TRUTHS, "brief", "think_first") * 4, 400)


def tuned_policy(tokenizer, folder, steps=120):
    "A judge that knows the form and not the facts, so that its rewards differ within a group."
    model = new_model(tokenizer, hidden_size=32, layers=1, heads=2)
    rows = sft_dataset(PAIRS * 2, TRUTHS + CHAINS)
    train_sft(model, tokenizer, rows, folder, steps=steps, batch=12, lr=2e-2)
    return model


def copy_of(model, tokenizer):
    "A copy; `deepcopy` would share the forward method that TRL puts into a model that it trained."
    copy = new_model(tokenizer, hidden_size=32, layers=1, heads=2)
    copy.load_state_dict(model.state_dict())
    return copy


OWN = {"prompts_per_step": 3, "group": 4, "lr": 3e-3, "max_new_tokens": 48, "micro_batch": 0, "beta": 0.0,
       "temperature": 0.99, "seed": 0}  # of rl_config


def settings(folder, steps=4, **changes):
    "The book's own configuration for three prompts in groups of four; further `changes` are GRPOConfig's names."
    config = rl_config(folder, steps, warmup=1, **{name: changes.pop(name, value) for name, value in OWN.items()})
    values = {field.name: getattr(config, field.name) for field in fields(config) if field.init}
    derived = {"generation_batch_size": None, "steps_per_generation": None, "save_strategy": "no",
               "use_cpu": True}
    return GRPOConfig(**values | derived | changes)


def trainer(trainer_class, model, tokenizer, config, credit="srpo_return", **options):
    "A StepGRPOTrainer or a descendant of it over the twelve pairs."
    set_seed(config.seed)
    return trainer_class(model, args=config, train_dataset=rl_dataset(PAIRS), processing_class=tokenizer, pairs=PAIRS,
                credit=credit, **options)


def scripted_responses(tokenizer, seed=0):
    "Sixty-four responses: true chains, chains of other pairs, and chains that were cut, doubled or scrambled."
    rng = random.Random(seed)
    responses = []
    for _ in range(64):
        text = render(rng.choice(TRUTHS))
        ids = tokenizer(text)["input_ids"]
        if rng.random() < 0.2: ids = ids[:rng.randrange(1, len(ids))]
        elif rng.random() < 0.2: ids = tokenizer("<item> mug <query> boots " + text)["input_ids"][:38]
        responses.append(ids + [tokenizer.eos_token_id])
    return responses


class ScriptedTrainer(StepGRPOTrainer):
    "Scripted responses: the prompt and the index in the group decide, no process and no random number."
    script = ()

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, **options):
        first = self.accelerator.process_index * len(prompt_ids)
        places = ((first + i) % num_generations for i in range(len(prompt_ids)))
        return [self.script[(sum(ids) * 7 + place) % len(self.script)] for ids, place in
                zip(prompt_ids, places, strict=True)], None


class RecordingTrainer(StepGRPOTrainer):
    "Records every generation batch."
    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        actual = as_rows(output) if output["completion_ids"].dim() == 3 else output
        kept = {name: value.clone() for name, value in actual.items()}  # TRL shuffles what it was given
        self.__dict__.setdefault("batches", []).append((inputs, kept))
        return output


CLOCK = ("seconds", "step_time", "runtime", "per_second", "total_flos")


def rows(trainer):
    "The log without what the clock says."
    return [{name: value for name, value in row.items() if not any(word in name for word in CLOCK)}
            for row in trainer.state.log_history if "train_runtime" not in row]


def weights(model): return torch.cat([each.detach().flatten().cpu() for each in model.parameters()])


def moved(run, before): return (weights(run.model) - weights(before)).abs().max() > 1e-3
