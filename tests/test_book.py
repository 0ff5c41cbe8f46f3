"""The real thing, small. A newcomer's path: a fresh clone, `make book`, one thing changed as the README shows it, a new row in
the report. And the same book, killed -9 twice in the middle of a training and continued: the same numbers."""
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, Desk

from she_nb.evidence.evaluate import read_records

BIN = Path(sys.executable).parent
LINE = re.search(r"^she-nb book (-p arms \S+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)[1]
MICRO = "book", "--preset", "micro"
AGAIN = ("train-grpo-s0", "evaluate-sft-s0", "evaluate-dpo-s0", "evaluate-grpo-s0", "judge_test-dpo-s0",
         "judge_test-grpo-s0")   # each is of a stage that the arm srpo runs as well, and none is read on its way


class Clone(Desk):
    "A desk that is a clone, with the library that it holds."
    shared = {}   # what the tests keep warm is another book's

    def __init__(self, folder):
        subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
        changed = subprocess.run(["git", "diff", "--binary", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
        if changed: subprocess.run(["git", "apply", "-"], cwd=folder, input=changed, check=True)  # not committed yet
        super().__init__(folder)
        own = {name: value for name, value in self.env.items() if not name.startswith("SHE_NB_")}
        self.env = own | {"PYTHONPATH": str(folder)}

    def begin(self, *words):
        "Start make in the background; `ended` waits for it, so that two books can be made side by side."
        words = "make", "-o", ".venv/.book", f"BIN={BIN}", *words
        self.process = subprocess.Popen(words, cwd=self.folder, env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def ended(self):
        if not self.process.stderr.closed: self.said = self.process.communicate()[1].decode()
        assert self.process.returncode == 0, self.said

    def rows(self): return [line for line in (self.reports / "book/report.md").read_text().splitlines() if line.startswith("| ")]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    clone = Clone(tmp_path_factory.mktemp("newcomer") / "she-nb")
    clone.begin("book", "PRESET=micro")
    yield clone
    clone.process.kill()  # where a test failed: she-nb sees its parent gone and takes its children with it
    clone.process.wait()


def records(desk): return {record["folder"].name: record for record in read_records(desk.reports / "book")}


def numbers(desk):
    "Final metrics of every run, less what the clock says."
    return {key: {name: str(value) for name, value in record["metrics"].items() if "second" not in name}
            for key, record in records(desk).items() if record["stage"] != "report"}


def wait_for(line, path, process, seconds=400):
    until = time.monotonic() + seconds
    while not path.exists() or line not in path.read_text(errors="replace"):
        assert process.poll() is None and time.monotonic() < until, f"{path} never said: {line}"
        time.sleep(.05)


def warm_processes(process):
    "The process from which all stages of a running book are forked, unless it shares another's."
    return [child for child in psutil.Process(process.pid).children() if "she_nb.book.kernels" in child.cmdline()]


def test_killed_in_training_ends_with_the_same_numbers(tmp_path, clone):
    "Every stage runs once more, from the data to the report; what only repeats one has the clone's record."
    clone.ended()
    desk = Desk(tmp_path)
    for key in AGAIN: shutil.copytree(clone.reports / "book/runs" / key, desk.reports / "book/runs" / key)
    log = desk.work / "book/logs/train-srpo-s0.log"
    process = desk.start(*MICRO)
    wait_for("step 5 of 12", log, process)  # behind the first checkpoint
    warm_processes(process)[0].kill()       # the stages die and the command does not: it sees them fail
    assert process.wait(60)
    assert "the process was killed" in log.with_suffix(".error").read_text()
    log.unlink()
    process = desk.start(*MICRO, shared=desk.shared)   # its stages have another parent, and die with it all the same
    wait_for("step 8 of 12", log, process)
    assert bool(warm_processes(process)) != bool(desk.shared)
    process.kill()
    process.wait()
    assert "continuing from checkpoint-3" in log.read_text()
    finished = {key: record["seconds"] for key, record in records(desk).items()}
    assert "sft-sft-s0" in finished and "train-srpo-s0" not in finished
    said = desk.run(*MICRO)
    assert said.returncode == 0, said.stderr
    assert "continuing from checkpoint-" in log.read_text()
    assert "continuing" not in (clone.work / "book/logs/train-srpo-s0.log").read_text()
    again = {key: record["seconds"] for key, record in records(desk).items()}
    assert {key: again[key] for key in finished} == finished  # no finished stage was repeated
    assert numbers(desk) == numbers(clone)
    assert (desk.reports / "book/report.html").stat().st_size > 10_000


def test_one_thing_changed_is_a_new_row(clone):
    clone.ended()
    before, finished = clone.rows(), {key: record["seconds"] for key, record in records(clone).items()}
    said = clone.run(*MICRO, *shlex.split(LINE))
    assert said.returncode == 0, said.stderr
    assert [line for line in clone.rows() if line.startswith("| SRPO, gamma = 0.6 |")]
    assert not [line for line in before if "gamma = 0.6" in line]
    again = records(clone)
    assert {key for key in again if finished.get(key) != again[key]["seconds"]} == {   # and nothing else ran
        *(f"{stage}-srpo+gamma=0.6-s0" for stage in ("train", "evaluate", "gullibility")), "report-all-s0"}
    assert again["train-srpo+gamma=0.6-s0"]["parameters"]["gamma"] == 0.6
