"The package outside its repository: what the wheel holds starts fast and says what is missing."
import os
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT, refused


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, unpacked: a folder to import from, with nothing of the repository beside it."
    folder = tmp_path_factory.mktemp("wheel")
    words = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    subprocess.run(list(map(str, words)), check=True, capture_output=True)
    (made,) = folder.glob("she_nb-*.whl")
    with zipfile.ZipFile(made) as packed: packed.extractall(folder / "she")
    return folder / "she"


def python(wheel, *words):
    env = {key: value for key, value in os.environ.items() if not key.startswith("SHE_NB_")} | {"PYTHONPATH": str(wheel)}
    return subprocess.run([sys.executable, *words], cwd=wheel, env=env, capture_output=True, text=True)


def test_the_command_starts_fast_and_without_torch(wheel):
    code = ("import sys, time; start = time.perf_counter(); import she_nb.book.cli; took = time.perf_counter() - start; "
            "print(she_nb.__file__); sys.exit('torch' in sys.modules or took > 3)")
    done = python(wheel, "-c", code)
    assert done.returncode == 0 and str(wheel) in done.stdout


def test_outside_the_book_one_sentence_says_what_is_missing(wheel):
    refused(python(wheel, "-m", "she_nb.book.cli", "book"), "run she-nb inside the book's folder")
    assert "ablations" in python(wheel, "-m", "she_nb.book.cli", "--help").stdout


def test_the_judge_works_outside_the_book(wheel, policy, tokenizer, tmp_path):
    from she_nb.serving.card import write_card
    for part in (policy, tokenizer): part.save_pretrained(tmp_path)
    write_card(tmp_path, {"order": "think_first", "rule": "brief", "max_completion": 48}, stage="sft")
    (tmp_path / "case.csv").write_text("query,docid,title,rating\nred boots,A,red boots,\nblue mug,B,red mug,\n")
    words = "-m", "she_nb.book.cli", "judge", tmp_path / "case.csv", "-o", tmp_path / "judged.csv", "--model", tmp_path
    done = python(wheel, *map(str, words))
    assert done.returncode == 0 and "rows      2: 2 judged now" in done.stdout, done.stderr
    assert len((tmp_path / "judged.csv").read_text().splitlines()) == 3
