"""The graph under Snakemake with toy stages: done once, resumed after kill -9, failing in one sentence."""
import os
import signal
import time

import pytest
from conftest import ROOT, refused, write_stages

from she_nb.book.graph import open_book, plan
from she_nb.book.records import read_record
from she_nb.book.settings import variant

BOOK = ("book", "--preset", "micro", "-p", "start", "sft", "-p", "reward", "oracle", "-p", "curriculum", "single")  # nine runs


def stamps(desk): return {path: path.stat().st_mtime_ns for path in desk.reports.rglob("run.json")}


def test_killed_resumed_and_left_alone(desk):
    "kill -9 in the trainings; the same command then makes only what is missing, and the next one nothing."
    (slow := desk.folder / "slow").touch()
    train = f"import os, time\nfor step in range(20): print('step', step); time.sleep(.3 * os.path.exists({str(slow)!r}))"
    write_stages(desk.folder / "stages", train=train)
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
    slow.unlink()
    said = desk.run(*BOOK)
    assert said.returncode == 0, said.stderr
    assert f"{9 - len(made)} of 9 runs to do" in said.stdout and "report.html" in said.stdout
    after = stamps(desk)
    assert len(after) == 9 and before.items() <= after.items()
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
    assert "9 of 9 runs would run" in said.stdout and desk.files() == []


NAMES = "商品", "商品!", "☂"

def test_two_catalogues_never_share_a_folder(desk):
    "Records of one are not pruned by the book of the other, whatever their names are written in."
    for name in NAMES: (desk.folder / f"{name}.csv").write_text("id,title,category\n1,靴子,Shoes > Boots\n", encoding="utf-8")
    books = [open_book("micro", catalog=str(desk.folder / f"{name}.csv")) for name in NAMES]
    assert len({book.report for book in books}) == 3
    said = desk.run("book", "--preset", "micro", "--dry-run", "--catalog", desk.folder / "商品!.csv")
    assert said.returncode == 0 and "runs would run" in said.stdout and desk.files() == []


@pytest.mark.parametrize("preset", ["tiny", "micro", "tiny-moe", "smol", "smol-smoke"])
def test_real_stages_fit_the_settings(preset):
    "Every stage notebook declares names and types that settings.ini can fill."
    if not (ROOT / "nbs/stages/train.ipynb").exists(): pytest.skip("the stage notebooks are not here")
    book = open_book(preset, studies=True)
    runs = plan(book)
    keys = [run.key for run in runs]
    assert len(set(keys)) == len(keys)
    for seed in book.seeds:
        assert {f"evaluate-{arm}-s{seed}" for arm in ("sft", "dpo", *book.arms_of(seed))} <= set(keys)
        assert {f"data-all-s{seed}", f"judge-all-s{seed}", f"judge_test-srpo-s{seed}"} <= set(keys)
    stages = {"data", "sft", "dpo", "judge", "judge_test", "ask", "select", "train", "tune", "evaluate", "report"}
    assert {run.stage for run in runs} == stages | {*book.settings.studies, *book.settings.questions}
    assert runs[-1].stage == "report" and set(runs[-1].needs) == {run.key for run in runs[:-1]}


def settings_of(arm): return variant(open_book("tiny").settings, arm)[1]

def twin_of(arm): return "grpo" + arm.removeprefix("srpo")


def test_twins_differ_in_their_rule_alone():
    "Every arm of SRPO that has a twin under GRPO takes the same settings, data, first model and prompts."
    runs = {run.key: run for run in plan(open_book("tiny", studies=True))}
    declared = [arm for arm, _ in open_book("tiny").settings.declared if arm.startswith("srpo_")]
    arms = [arm for arm in declared if f"train-{twin_of(arm)}-s0" in runs]
    assert {"srpo_after_sft", "srpo_random", "srpo_steps", "srpo_120", "srpo_group_4", "srpo_one"} <= set(arms)
    for arm in arms:
        assert settings_of(arm) == settings_of(twin_of(arm))
        ours, theirs = (set(runs[f"train-{name}-s0"].needs) for name in (arm, twin_of(arm)))
        assert ours - theirs <= {"judge-all-s0"} and theirs <= ours


def test_worlds_share_no_run():
    "What has other wishes has its own data, its own first model, and is evaluated on its own tests."
    runs = {run.key: run for run in plan(open_book("tiny", studies=True))}
    for world, data in {"one": "wishes_1", "two": "wishes_0_1", "four": "wishes_0_0_0_1"}.items():
        assert runs[f"sft-sft_{world}-s1"].needs == (f"data-{data}-s1",)
        for rule in ("grpo", "grpo_mean", "srpo"):
            assert runs[f"train-{rule}_{world}-s1"].needs == (f"data-{data}-s1", f"sft-sft_{world}-s1")
            assert runs[f"evaluate-{rule}_{world}-s1"].needs == (f"data-{data}-s1", f"train-{rule}_{world}-s1")


def test_groups_of_any_size_have_as_many_responses():
    settings = [settings_of(arm) for arm in ("srpo", "srpo_group_4", "srpo_group_16", "grpo_group_4", "grpo_group_16")]
    assert {own.group_size * own.prompts_per_step for own in settings} == {256}
