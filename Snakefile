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
first = {("judge", "all"): 300, "evaluate": 200, "judge_test": 170, "ask": 160, "select": 160, "tune": 220, "train": 100, "judge": -50}
first |= {("train", arm): 150 for arm in book.arms}   # what all studies are held against; last, what few wait for


rule all:
    input: [path for run in todo for path in outputs(book, run)]


for run in todo:
    what = job(book, run, todo)

    rule:
        name: re.sub(r"\W", "_", run.key)
        input: what["input"]
        output: what["output"]
        threads: run.threads
        priority: first.get((run.stage, run.arm), first.get(run.stage, 0)) - run.seed  # early seeds first (the search has seed 100)
        params: command=what["command"]
        shell: "exec {params.command}"
