"""Every mistake of the user: one clear sentence, a non-zero exit, no half-written file."""
import json
import subprocess

import pytest
from conftest import Desk, refused, write_stages

GOOD = {"id": "1", "title": "Red boots", "category": "Shoes > Boots", "attributes": {"color": "red"}}
CATALOGS = {
    "empty": ([], "is empty"),
    "no title": ([GOOD, {**GOOD, "id": "2", "title": ""}], "row 2, title is missing"),
    "unknown category": ([GOOD, {**GOOD, "id": "2", "category": "Shoes > "}], "is an unknown category path"),
    "duplicate ids": ([GOOD, GOOD], "row 2, id '1' repeats row 1"),
}


@pytest.mark.parametrize("case", CATALOGS)
def test_bad_catalogue(desk, case):
    rows, words = CATALOGS[case]
    file = desk.folder / "shop.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused(desk.run("book", "--preset", "micro", "--catalog", file), words)
    assert desk.files() == []


@pytest.mark.parametrize("words, said", [
    (["book", "--catalog", "missing.csv"], "missing.csv does not exist"),
    (["book", "--preset", "huge"], "has no preset [huge]; it has tiny, micro"),
    (["book", "-p", "rl_step", "2"], "unknown key rl_step; did you mean rl_steps?"),
    (["book", "-p", "gamma", "two"], "gamma = two is not a number"),
    (["book", "-p", "gamma", "2"], "gamma = 2 lies outside 0 to 1"),
    (["book", "-p", "arms", "srop+gamma=0.6"], "there is no arm srop; did you mean srpo?"),
    (["settings", "arms"], "has no preset [arms]; it has tiny, micro"),
    (["book", "--cores", "two"], "invalid int value"),
    (["book", "--cores", "0"], "--cores = 0"),
    (["book", "--name", "a/b"], "cannot name a folder"),
    (["stage", "trian"], "There is no stage trian"),
    (["stage", "train", "-p", "rl_step", "2"], "Stage train has no parameter rl_step; it has arm"),
    (["stage", "train", "-p", "seed", "one"], "seed = one is not a whole number"),
    (["boook"], "invalid choice"),
])
def test_bad_command(desk, words, said):
    refused(desk.run(*words), said)
    assert desk.files() == []


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 2 MB; needs the right to mount one."
    folder = tmp_path / "small"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    mount = subprocess.run(words, capture_output=True, text=True)
    if mount.returncode: pytest.skip(f"mounting a tmpfs is not allowed here: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_small_disk_is_refused_at_once(small_disk, tmp_path):
    write_stages(tmp_path / "stages")
    desk = Desk(small_disk, tmp_path / "stages")
    refused(desk.run("book", "--preset", "micro"), "MB free and a book needs 500")
    assert desk.files() == []


def test_disk_that_fills_in_a_stage(small_disk, tmp_path):
    body = "from she_nb.task import atomic_write\natomic_write(run.record / 'curves', b'x' * 10**7)"
    write_stages(tmp_path / "stages", data=body)
    desk = Desk(small_disk, tmp_path / "stages")
    record = small_disk / "record"
    done = desk.run("stage", "data", "-p", "record", record, "--output", tmp_path / "data.ipynb")
    refused(done, "No space left on device")
    assert list(record.iterdir()) == []


def test_disk_that_is_full(small_disk, tmp_path):
    write_stages(tmp_path / "stages")
    desk = Desk(tmp_path, tmp_path / "stages")
    with (small_disk / "filler").open("wb", buffering=0) as file, pytest.raises(OSError):
        while True: file.write(b"x" * 4096)
    refused(desk.run("stage", "data", "--output", small_disk / "data.ipynb"), "No space left on device")
    left = [path for path in small_disk.iterdir() if path.name != "filler" and path.stat().st_size]
    assert left == []
