"""The real thing: micro book, kill -9 in the middle of a training, the same command again, the same numbers."""
import os
import signal
import time

from conftest import Desk

from she_nb.evaluate import read_records

BOOK = "book", "--preset", "micro", "-p", "rl_steps", "12", "-p", "arms", "srpo"  # every stage, one arm


def records(desk): return {record["folder"].name: record for record in read_records(desk.reports / "book")}


def numbers(desk):
    "Final metrics of every run, less what the clock says."
    return {key: {name: value for name, value in record["metrics"].items() if "second" not in name}
            for key, record in records(desk).items() if record["stage"] != "report"}


def wait_for(line, path, process, seconds=400):
    until = time.monotonic() + seconds
    while not path.exists() or line not in path.read_text(errors="replace"):
        assert process.poll() is None and time.monotonic() < until, f"{path} never said: {line}"
        time.sleep(.05)


def test_killed_in_training_ends_with_the_same_numbers(tmp_path):
    killed, whole = (tmp_path / name for name in ("killed", "whole"))
    for folder in (killed, whole): folder.mkdir()
    killed, whole = Desk(killed), Desk(whole)
    process, log = killed.start(*BOOK), killed.work / "book/logs/train-srpo-s0.log"
    wait_for("step 5 of 12", log, process)  # behind the first checkpoint
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = {key: record["seconds"] for key, record in records(killed).items()}
    assert "sft-sft-s0" in finished and "train-srpo-s0" not in finished
    for desk in (killed, whole):
        said = desk.run(*BOOK)
        assert said.returncode == 0, said.stderr
    assert "continuing from checkpoint-" in log.read_text()
    assert "continuing" not in (whole.work / "book/logs/train-srpo-s0.log").read_text()
    again = {key: record["seconds"] for key, record in records(killed).items()}
    assert {key: again[key] for key in finished} == finished  # no finished stage was repeated
    assert numbers(killed) == numbers(whole)
    assert (killed.reports / "book/report.html").stat().st_size > 10_000
