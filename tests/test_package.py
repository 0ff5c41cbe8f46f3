"The package outside its repository: what the wheel holds starts fast and says what is missing."
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
import zipfile

import pytest
from conftest import ROOT, refused


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, unpacked: a folder to import from, with nothing of the repository beside it."
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"     # a build writes beside what it builds
    shutil.copytree(ROOT / "she_nb", source / "she_nb", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ["pyproject.toml", "README.md", "LICENSE"]: shutil.copy(ROOT / name, source)
    words = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("she_nb-*.whl")
    with zipfile.ZipFile(made) as packed: packed.extractall(folder / "she")
    return folder / "she"


def python(wheel, *words):
    env = {key: value for key, value in os.environ.items() if not key.startswith("SHE_NB_")} | {"PYTHONPATH": str(wheel)}
    return subprocess.run([sys.executable, *words], cwd=wheel, env=env, capture_output=True, text=True)


def test_the_command_starts_fast_and_without_torch(wheel):
    code = ("import sys, time; start = time.process_time(); import she_nb.book.cli; took = time.process_time() - start; "
            "print(she_nb.__file__); sys.exit('torch' in sys.modules or took > 3)")
    done = python(wheel, "-c", code)
    assert done.returncode == 0 and str(wheel) in done.stdout


def test_outside_the_book_one_sentence_says_what_is_missing(wheel):
    refused(python(wheel, "-m", "she_nb.book.cli", "book"), "run she-nb inside the book's folder")
    assert "ablations" in python(wheel, "-m", "she_nb.book.cli", "--help").stdout


AT_WORK = """
import sys
from she_nb.book.cli import main
assert main("judge case.csv -o judged.csv --model .".split()) == 0
sys.exit(main("serve --model . --port 0".split()))
"""

def test_the_judge_works_and_serves_outside_the_book(wheel, policy, tokenizer, tmp_path):
    "In one process, which loads PyTorch once."
    from she_nb.serving.card import write_card
    for part in (policy, tokenizer): part.save_pretrained(tmp_path)
    write_card(tmp_path, {"order": "think_first", "rule": "brief", "max_completion": 48}, stage="sft")
    (tmp_path / "case.csv").write_text("query,docid,title,rating\nred boots,A,red boots,\nblue mug,B,red mug,\n")
    env = {key: value for key, value in os.environ.items() if not key.startswith("SHE_NB_")} | {"PYTHONPATH": str(wheel)}
    working = subprocess.Popen([sys.executable, "-c", AT_WORK], cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    try:
        said = [working.stdout.readline()]
        while said[-1] and "/v1/" not in said[-1]: said.append(working.stdout.readline())
        assert said[-1] and "rows      2: 2 judged now" in "".join(said), (said, working.poll())
        assert len((tmp_path / "judged.csv").read_text().splitlines()) == 3
        place = said[-1].split(" at ")[1].partition("/v1/")[0]
        with urllib.request.urlopen(f"{place}/health", timeout=60) as answer: assert answer.status == 200
    finally: working.send_signal(signal.SIGINT)
    assert "Ended; 0 pairs were judged." in working.communicate(timeout=60)[0] and working.returncode == 0


FOLLOW = """
import json, sys
from she_nb.book.cli import main
sheet = []
def row(number):
    tier, sure = 4 - number % 4, .55 + number % 40 / 100
    p = {f"p_{own}": sure if own == tier else (1 - sure) / 3 for own in (4, 3, 2, 1)}
    people = tier - 1 if number % 7 else (tier + 1) % 4
    sheet.append(f"query {number // 6},A{number},{people},{1 + number % 3}\\n")
    told = {"query": f"query {number // 6}", "doc_id": f"A{number}", "title": "mug", "tier": tier, "rating": str(tier)}
    return told | p | {"scale": "tiers", "confidence": sure, "status": "ok", "model": "4f1d", "asked": "mug", "item": "cups"}
open("judged.jsonl", "w").write("".join(json.dumps(row(number)) + "\\n" for number in range(120)))
open("rated.csv", "w").write("query,docid,rating,weight\\n" + "".join(sheet))
ranks = "".join(f"query {number // 6},A{number},{number}\\n" for number in range(120))
open("run.csv", "w").write("query,docid,rank\\n" + ranks)
for line in ("agree judged.jsonl rated.csv --scale 0-3 -o agree",
             "calibrate judged.jsonl rated.csv --scale 0-3 -o judge.cal.json",
             "export judged.jsonl --to quepid -o q.csv", "export judged.jsonl --to opensearch --cal judge.cal.json -o o.json",
             "measure judged.jsonl --run run.csv --labels rated.csv --scale 0-3", "sample judged.jsonl -n 20 -o to_rate.csv"):
    assert main(line.split()) == 0, line
assert "torch" not in sys.modules
"""

def test_what_follows_a_judgment_works_in_an_empty_folder_and_without_torch(wheel, tmp_path):
    env = {key: value for key, value in os.environ.items() if not key.startswith("SHE_NB_")} | {"PYTHONPATH": str(wheel)}
    done = subprocess.run([sys.executable, "-c", FOLLOW], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "weighted by the column weight (1 to 3): the pairs stand for 240" in done.stdout
    made = {"agree", "judge.cal.html", "judge.cal.json", "judge.cal.png", "o.json", "q.csv", "to_rate.csv"}
    assert {path.name for path in tmp_path.iterdir()} == made | {"judged.jsonl", "rated.csv", "run.csv"}
