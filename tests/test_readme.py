"The README is what nbs/index.ipynb says, it is short, and what it tells you to type exists."
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from she_nb.book.cli import parser
from she_nb.book.graph import open_book
from she_nb.book.stages import check_arguments, declared, stage_notebook

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", TEXT, re.S)
INLINE = re.findall(r"`((?:make|she-nb) [^`]+)`", TEXT)
COMMANDS = sorted({line.partition("#")[0].strip() for line in "\n".join([*BLOCKS, *INLINE]).splitlines()} - {""})
BIN = Path(sys.executable).parent


def make(*words):
    "make with this environment as it is, and none of the options of a `make` around us."
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    words = ["make", "-o", ".venv/.book", "-o", ".venv/.test", f"BIN={BIN}", *map(str, words)]
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)


def test_it_is_made_from_the_index(tmp_path):
    done = make("readme", f"README={tmp_path / 'README.md'}")
    assert done.returncode == 0, done.stderr
    made = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert made == TEXT, "nbs/index.ipynb or what it reads changed; run make readme"


def test_it_is_short(): assert len(TEXT.splitlines()) <= 200


def test_the_two_commands_are_shown(): assert {"make book", "make test"} <= set(COMMANDS)


def values(words):
    "The pairs of name and value behind each -p, numbers as numbers."
    pairs = [(words[i + 1], words[i + 2]) for i, word in enumerate(words) if word == "-p"]
    def number(text): return int(text) if text.isdigit() else float(text)
    return {name: number(value) if re.fullmatch(r"[\d.]+(e-?\d+)?", value) else value for name, value in pairs}


def check_make(words):
    settings = [word.partition("=")[0] for word in words[1:] if "=" in word]
    assert all(f"$({name})" in (ROOT / "Makefile").read_text() for name in settings)
    done = make("-n", *words[1:])
    assert done.returncode == 0, done.stderr


def check_papermill(words):
    notebook = ROOT / words[1]
    check_arguments(notebook.stem, declared(notebook), values(words))


def check_she_nb(words):
    args = parser().parse_args(words[1:])
    if args.command == "stage": check_arguments(args.stage, declared(stage_notebook(args.stage)), values(words))
    elif args.command == "settings": open_book(args.preset)
    elif args.command in ("book", "ablations"): open_book(args.preset, args.name, **values(words))


def check_source(words): assert words == ["source", ".venv/bin/activate"]


CHECKS = {"make": check_make, "papermill": check_papermill, "she-nb": check_she_nb, "source": check_source}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_exists(command):
    words = shlex.split(command)
    CHECKS[words[0]](words)


def test_each_link_leads_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert links and not [link for link in links if "://" not in link and not (ROOT / link).exists()]


SHOWN = re.findall(r"```(?:python|ini)\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.S)

@pytest.mark.parametrize("block", SHOWN, ids=[block.split("\n")[0][:30] for block in SHOWN])
def test_what_contributing_shows_is_real(block):
    "Each block of code stands somewhere in the book or in settings.ini, line by line."
    cells = (cell for path in ROOT.glob("nbs/**/*.ipynb") for cell in json.loads(path.read_text())["cells"])
    book = "".join("".join(cell["source"]) for cell in cells) + (ROOT / "settings.ini").read_text(encoding="utf-8")
    assert all(line.strip() in book for line in block.splitlines())


NOTEBOOKS = sorted([*ROOT.glob("nbs/stages/*.ipynb"), *ROOT.glob("nbs/ablations/*.ipynb")])

def line_of(notebook):
    "The line under a notebook's title that runs it."
    first = "".join(json.loads(notebook.read_text())["cells"][0]["source"])
    return re.search(r"^    (papermill .*)$", first, re.M)[1]

@pytest.mark.parametrize("notebook", [path for path in NOTEBOOKS if path.stem != "report"], ids=lambda path: path.stem)
def test_the_line_of_a_notebook_fits_it(notebook):
    words = shlex.split(line_of(notebook).replace("$PWD", str(ROOT)))
    assert ROOT / words[1] == notebook
    check_papermill(words)


def test_a_line_runs(tmp_path):
    line = line_of(ROOT / "nbs/ablations/gamma.ipynb").replace("$PWD", str(ROOT)).replace("work/", f"{tmp_path}/")
    done = subprocess.run([f"{BIN}/{line}"], shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "gamma.ipynb").is_file(), done.stderr
