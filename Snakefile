# The graph of a book's runs: each rule is one papermill call of a notebook in nbs/stages. `she-nb book` starts it.
# By hand, from the folder of the book, here or with a profile of a cluster:
#     snakemake --cores 2 --forceall
#     snakemake --profile profiles/slurm --forceall --config executor=slurm gpus=1
# The records decide what is finished (she_nb.book.graph.pending), not file times: only pending runs have a rule here.
import os
import signal

from she_nb.book.cli import watch_parent
from she_nb.book.clusters import resources, rule_name, spread
from she_nb.book.graph import job, outputs, pending, plan, read_book

watch = os.environ.get("SHE_NB_WATCH")
if watch == "all": watch_parent()
elif watch == "driver":   # the jobs of a cluster run on other machines, and watch nobody
    del os.environ["SHE_NB_WATCH"]
    signal.signal(signal.SIGINT, signal.default_int_handler)   # in the background it would be ignored
    watch_parent(end=signal.SIGINT)

book = read_book(config.get("book", ""))
todo = pending(book, plan(book))
shared = local if workflow.storage_settings.default_storage_provider else str   # pods see the book's folder, on a volume
named = workflow.resource_settings.overwrite_resources   # set-resources, of a run's rule or of a stage: all its runs
# the longest path first: what reinforcement learning begins with, then the book's own arms, of which the last takes longest
first = {"data": 310, ("sft", "sft"): 305, ("judge", "all"): 300, "dpo": 280, "ask": 270, "select": 260, "tune": 220,
         "evaluate": 200, "judge_test": 170, "train": 100, "judge": -50}
first |= {("train", arm): 240 + place for place, arm in enumerate(book.arms)}   # what all studies are held against


rule all:
    input: [shared(path) for run in todo for path in outputs(book, run)]


for run in todo:
    what = job(book, run, todo)

    rule:
        name: rule_name(run)
        input: [shared(path) for path in what["input"]]
        output: [shared(path) for path in what["output"]]
        threads: run.cores
        priority: first.get((run.stage, run.arm), first.get(run.stage, 0)) - run.seed  # early seeds first (the search has seed 100)
        resources: **resources(run, config)
        params: command=lambda wildcards, resources, what=what: spread(what["command"], resources.get("nodes", 1))
        shell: "exec {params.command}"

    for name in (run.stage, rule_name(run)): workflow.get_rule(rule_name(run)).resources.update(named.get(name, {}))
