"""The graph under Snakemake with toy stages: done once, resumed after kill -9, failing in one sentence."""
import os
import signal
import time

import pytest
from conftest import ROOT, refused, write_stages

from she_nb.book.graph import open_book, plan
from she_nb.book.records import read_record

BOOK = ("book", "--preset", "micro", "-p", "start", "sft", "-p", "reward", "oracle", "-p", "curriculum", "single")  # eight runs


def stamps(desk): return {path: path.stat().st_mtime_ns for path in desk.reports.rglob("run.json")}


def test_killed_resumed_and_left_alone(desk):
    "kill -9 in the trainings; the same command then makes only what is missing, and the next one nothing."
    slow = "import time\nfor step in range(20): time.sleep(.3); print('step', step)"
    write_stages(desk.folder / "stages", train=slow)
    process = desk.start(*BOOK)
    log, until = desk.work / "book/logs/train-srpo-s0.log", time.monotonic() + 200
    while not (log.exists() and "step 1" in log.read_text()):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = stamps(desk)
    made = {path.parent.name for path in before}
    assert {"data-all-s0", "sft-sft-s0"} <= made and "train-srpo-s0" not in made
    said = desk.run(*BOOK)
    assert said.returncode == 0, said.stderr
    assert f"{8 - len(made)} of 8 runs to do" in said.stdout and "report.html" in said.stdout
    after = stamps(desk)
    assert len(after) == 8 and before.items() <= after.items()
    began = time.monotonic()
    assert "nothing to do" in desk.run(*BOOK).stdout
    assert time.monotonic() - began < 10 and stamps(desk) == after
    assert read_record(desk.reports / "book/runs/train-srpo-s0/run.json").metrics == {"wild/accuracy": 0.5}


def test_a_failing_stage(desk):
    "Its sentence reaches the terminal; what did not depend on it is done. So it is for a catalogue in any script."
    write_stages(desk.folder / "stages", train="if arm == 'grpo': raise ZeroDivisionError('by nothing')")
    catalog = desk.folder / "商品.csv"
    rows = [f"{i},靴子 {i},Shoes > {('Boots', 'Trainers')[i % 2]}" for i in range(60)]
    catalog.write_text("\n".join(["id,title,category", *rows]), encoding="utf-8")
    refused(desk.run(*BOOK, "--catalog", catalog), "Stage train failed in cell", code=1)
    assert {path.parts[-4] for path in stamps(desk)} == {"book-商品"}
    done = {path.parent.name for path in stamps(desk)}
    assert "evaluate-srpo-s0" in done and "train-grpo-s0" not in done and "report-all-s0" not in done


def test_dry_run_writes_nothing(desk):
    said = desk.run(*BOOK, "--dry-run")
    assert "8 of 8 runs would run" in said.stdout and desk.files() == []


NAMES = "商品", "商品!", "☂"

def test_two_catalogues_never_share_a_folder(desk):
    "Records of one are not pruned by the book of the other, whatever their names are written in."
    for name in NAMES: (desk.folder / f"{name}.csv").write_text("id,title,category\n1,靴子,Shoes > Boots\n", encoding="utf-8")
    books = [open_book("micro", catalog=str(desk.folder / f"{name}.csv")) for name in NAMES]
    assert len({book.report for book in books}) == 3
    said = desk.run("book", "--preset", "micro", "--dry-run", "--catalog", desk.folder / "商品!.csv")
    assert said.returncode == 0 and "runs would run" in said.stdout and desk.files() == []


@pytest.mark.parametrize("preset", ["tiny", "micro"])
def test_real_stages_fit_the_settings(preset):
    "Every stage notebook declares names and types that settings.ini can fill."
    if not (ROOT / "nbs/stages/train.ipynb").exists(): pytest.skip("the stage notebooks are not here")
    book = open_book(preset, studies=True)
    runs = plan(book)
    keys = [run.key for run in runs]
    assert len(set(keys)) == len(keys)
    for seed in book.seeds:
        assert {f"evaluate-{arm}-s{seed}" for arm in ("sft", "dpo", *book.arms_of(seed))} <= set(keys)
    stages = {"data", "sft", "dpo", "judge", "judge_test", "ask", "select", "train", "tune", "evaluate", "report"}
    assert {run.stage for run in runs} == stages | {*book.settings.studies, *book.settings.questions}
    assert runs[-1].stage == "report" and set(runs[-1].needs) == {run.key for run in runs[:-1]}
