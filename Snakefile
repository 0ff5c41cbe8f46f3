# The graph of a book's runs: each rule is one papermill call of a notebook in nbs/stages. `she-nb book` starts it.
# By hand, for example with an executor plugin on a cluster, from the folder of the book:
#     snakemake --cores 2 --forceall
# The records decide what is finished (she_nb.book.graph.pending), not file times: only pending runs have a rule here.
import os
import re

from she_nb.book.cli import watch_parent
from she_nb.book.graph import job, outputs, pending, plan, read_book

if "SHE_NB_WATCH" in os.environ: watch_parent()

book = read_book(config.get("book", ""))
todo = pending(book, plan(book))
# the longest path first: what reinforcement learning begins with, then the book's own arms, of which the last takes longest
first = {"data": 310, ("sft", "sft"): 305, ("judge", "all"): 300, "dpo": 280, "ask": 270, "select": 260, "tune": 220,
         "evaluate": 200, "judge_test": 170, "train": 100, "judge": -50}
first |= {("train", arm): 240 + place for place, arm in enumerate(book.arms)}   # what all studies are held against


rule all:
    input: [path for run in todo for path in outputs(book, run)]


for run in todo:
    what = job(book, run, todo)

    rule:
        name: re.sub(r"\W", "_", run.key)
        input: what["input"]
        output: what["output"]
        threads: run.cores
        priority: first.get((run.stage, run.arm), first.get(run.stage, 0)) - run.seed  # early seeds first (the search has seed 100)
        params: command=what["command"]
        shell: "exec {params.command}"
