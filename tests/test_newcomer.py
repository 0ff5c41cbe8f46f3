"A newcomer's path: a fresh clone, `make book`, one thing changed as the README shows it, a new row in the report."
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from she_nb.book import read_record

BIN = Path(sys.executable).parent
LINE = re.search(r"^she-nb book (-p arms \S+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)[1]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    "What git would hand to a newcomer, and what is not committed yet."
    folder = tmp_path_factory.mktemp("newcomer") / "she-nb"
    subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
    changed = subprocess.run(["git", "diff", "--binary", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
    if changed: subprocess.run(["git", "apply", "-"], cwd=folder, input=changed, check=True)
    return folder


def rows(clone): return [line for line in (clone / "reports/book/report.md").read_text().splitlines() if line.startswith("| ")]


def test_one_thing_changed_is_a_new_row(clone):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SHE_NB_", "MAKE"))}
    env["PYTHONPATH"] = str(clone)  # its library, not the one beside these tests
    model = clone / "work/book/train-srpo-s0/model.safetensors"
    make = "make", "-o", ".venv/.book", f"BIN={BIN}", "book", "PRESET=micro"
    more = BIN / "she-nb", "book", "--preset", "micro", *shlex.split(LINE)
    for words in (make, more):
        said = subprocess.run(words, cwd=clone, env=env, capture_output=True, text=True)
        assert said.returncode == 0, said.stderr
        if words is make: before, trained = rows(clone), model.stat().st_mtime_ns
    assert model.stat().st_mtime_ns == trained, "what was there was made again"
    new = [line for line in rows(clone) if line.startswith("| SRPO, gamma = 0.6 |")]
    assert new and not [line for line in before if "gamma" in line]
    (record,) = (clone / "reports/book/runs").glob("train-srpo+*/run.json")
    assert read_record(record).parameters["gamma"] == 0.6
