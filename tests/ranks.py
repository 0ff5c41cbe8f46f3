"""Run by test_ranks.py: short trainings in one process, in two and in three, forked from one that has imported everything."""
import os
import signal
import socket
import sys
from itertools import product
from pathlib import Path

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from small import (
    COLORS,
    THINGS,
    RecordingTrainer,
    ScriptedTrainer,
    corpus,
    make_tokenizer,
    new_model,
    pair,
    rows,
    scripted_responses,
    settings,
    train_tokenizer,
    trainer,
    weights,
)
from transformers import TrainerCallback

from she_nb.book.launch import accelerate_file
from she_nb.learning.judge import Judge
from she_nb.learning.ppo import Answer, PPOTrainer
from she_nb.learning.reward import Router
from she_nb.learning.sft import sft_dataset, train_sft
from she_nb.learning.trainers import StepGRPOTrainer, train_rl
from she_nb.policy.models import load_policy

PAIRS = [pair(i, *parts) for i, parts in enumerate(product(THINGS, COLORS, THINGS, (*COLORS, None)))]
TRUTHS = [each.truth for each in PAIRS]
STEP = {"prompts_per_step": 8, "group": 3, "max_new_tokens": 32, "optim": "sgd", "lr": 0.5,
        "save_strategy": "steps", "save_steps": 1}
CASES = {"grpo": {"credit": "grpo"}, "srpo": {}, "judge": {}, "refill": {"dynamic": True, "refill": 2},
         "ppo": {"dynamic": True, "refill": 1, "trainer_class": PPOTrainer, "critic_steps": 2}}


def tokenizer_of(): return train_tokenizer(corpus(PAIRS, TRUTHS, "brief", "think_first") * 2, 400)


def tune(out):
    "A policy that knows the form and half of the facts."
    tokenizer = tokenizer_of()
    model = new_model(tokenizer, 32, 1, 2)
    dataset = sft_dataset(PAIRS * 2, TRUTHS + TRUTHS[1:] + TRUTHS[:1])
    train_sft(model, tokenizer, dataset, out / "sft", steps=120, batch=12, lr=2e-2)
    for part in (model, tokenizer): part.save_pretrained(out / "policy")


class Kill(TrainerCallback):
    "The last rank is killed when a step begins."
    def __init__(self, at): self.at = at

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at and os.environ.get("RANK", "0") == "1": os.kill(os.getpid(), signal.SIGKILL)


def run(out, case, folder, kill=None):
    "One training; each rank leaves its log, its weights and what it sampled."
    tokenizer, options = tokenizer_of(), dict(CASES[case])
    class Recording(options.pop("trainer_class", StepGRPOTrainer)):
        seen = []

        def _calculate_rewards(self, inputs, prompts, completions, ids):
            rewards = super()._calculate_rewards(inputs, prompts, completions, ids)
            self.seen.append([(row["row"], list(response)) for row, response in zip(inputs, ids, strict=True)])
            return rewards

    if case == "ppo":
        prompts = tokenizer([each.query for each in PAIRS])["input_ids"]
        options["answers"] = [Answer(ids, [5 + i % 9, 7], float(i % 2)) for i, ids in enumerate(prompts)]
    config = settings(out / folder / "checkpoints", 4, **STEP)
    if case == "judge":
        judge = Judge(load_policy(out / "policy")[0], tokenizer, samples=2, new_tokens=(32,) * 5)
        options["router"] = Router("judge", judge)
    trainer, _ = train_rl(str(out / "policy"), tokenizer, PAIRS, config, trainer_class=Recording,
                          evaluation=Kill(kill) if kill else None, **options)
    rank, state = trainer.accelerator.process_index, trainer.accelerator.get_state_dict(trainer.model_wrapped)
    critic = weights(trainer.critic) if case == "ppo" else torch.zeros(1)
    result = {"rows": rows(trainer), "seen": trainer.seen, "weights": {name: value.clone() for name, value in state.items()},
              "critic": critic, "ranks": trainer.accelerator.num_processes, "kind": str(trainer.accelerator.distributed_type)}
    torch.save(result, out / folder / f"{rank}.pt")


class ScriptedRecordingTrainer(ScriptedTrainer, RecordingTrainer): pass


def run_responses(out, folder, each, micro, trainer_class=ScriptedRecordingTrainer):
    "Five steps on `each` responses in every process, `micro` in a forward pass: written beforehand, or the policy's own."
    tokenizer = make_tokenizer()
    config = settings(out / folder, 5, per_device_train_batch_size=micro, gradient_accumulation_steps=each // micro,
                      optim="sgd", lr=0.5)
    made = trainer(trainer_class, new_model(tokenizer, 32, 1, 2), tokenizer, config)
    made.script = scripted_responses(tokenizer)
    made.train()
    batches = [{name: batch[name] for name in ("completion_ids", "completion_mask", "advantages")} | {
             "row": [row["row"] for row in inputs]} for inputs, batch in made.batches]
    result = {"batches": batches, "rows": rows(made), "weights": weights(made.accelerator.unwrap_model(made.model)),
              "processes": made.accelerator.num_processes}
    (out / folder).mkdir(exist_ok=True)
    torch.save(result, out / folder / f"{made.accelerator.process_index}.pt")


def forked(ranks, work, **environ):
    "Run `work` in so many processes; their exit codes."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        if child := os.fork():
            children.append(child)
            continue
        code = 1
        try:
            if ranks > 1:
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
                os.environ |= {name: str(value) for name, value in place.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"} | environ
            work()
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def spread_weights():
    "accelerate has FSDP on GPUs alone, and whole weights elsewhere without a word; gloo does it, too, once the state says so."
    init = AcceleratorState.__init__

    def init_with_fsdp(self, *args, fsdp_plugin=None, **options):
        init(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is None: return
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init_with_fsdp


def fsdp_environment():
    "What `accelerate launch` makes of the book's file."
    parser = launch_command_parser()
    words = ["--config_file", str(accelerate_file("fsdp2")), "--num_processes", "2", "--main_process_port", "0", "script"]
    args, _, _ = _validate_launch_command(parser.parse_args(words))
    kept = ("ACCELERATE_", "FSDP_")
    return {name: value for name, value in prepare_multi_gpu_env(args).items() if name.startswith(kept)}


if __name__ == "__main__":
    out = Path(sys.argv[1])

    def cases(name, chosen=CASES):
        for case in chosen: run(out, case, f"{case}-{name}")

    def spread():
        spread_weights()
        cases("fsdp2", ["ppo"])

    def whole():
        run_responses(out, "scripted", 12, 12)
        run_responses(out, "sampled", 12, 12, RecordingTrainer)

    def halves():
        for micro in (6, 3): run_responses(out, f"scripted-{micro}", 6, micro)
        run_responses(out, "sampled-2", 6, 6, RecordingTrainer)

    ended = [forked(1, whole), forked(2, halves), forked(1, lambda: tune(out)), forked(1, lambda: cases(1)),
             forked(2, lambda: cases(2)), forked(3, lambda: cases(3, ["srpo", "ppo"]))]
    killed = forked(2, lambda: run(out, "ppo", "killed", kill=2))
    ended += [forked(2, lambda: run(out, "ppo", "killed")), forked(2, spread, **fsdp_environment())]
    print(ended, killed)
    sys.exit(any(map(any, ended)) or killed[1] != -signal.SIGKILL)
