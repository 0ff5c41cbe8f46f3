"""The micro book on a real Slurm of two nodes: a job is cancelled, a node dies, and the same command ends with the records of
a run on this machine. Minutes of both cores: `make test-slurm` runs it; SHE_NB_SLURM names its folder, where it goes on, and
SHE_NB_SLURM_WORDS adds options of `she-nb book`, which the record names."""
import csv
import hashlib
import json
import os
import shutil
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, Desk
from loopback import Loopback, missing, said

from she_nb.book.records import code_state
from she_nb.task import atomic_write

FOLDER = os.environ.get("SHE_NB_SLURM", "")
REASON = missing() if FOLDER else "it takes minutes of all cores: make test-slurm runs it"
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)

BOOK = "book", "--preset", "micro", *os.environ.get("SHE_NB_SLURM_WORDS", "").split()
MACHINE = ("seconds", "peak_rss_mb", "device", "commit", "dirty", "versions")  # of a record
CLOCK = ("second", "time")  # in the name of a metric


@pytest.fixture(scope="module")
def cluster():
    with Loopback(Path(FOLDER, "slurm")) as cluster: yield cluster


def profile(folder):
    "The book's own, but asking often."
    written = yaml.safe_load((ROOT / "profiles/slurm/config.yaml").read_text())
    written |= {"slurm-init-seconds-before-status-checks": 5, "latency-wait": 20}
    return atomic_write(folder / "profile/config.yaml", yaml.safe_dump(written)).parent


def begin(desk, *words):
    return subprocess.Popen(desk.words(*BOOK, *words), cwd=ROOT, env=desk.env, text=True, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE)


def wait_for(line, path, process, seconds=3600):
    until = time.monotonic() + seconds
    while not path.exists() or line not in path.read_text(errors="replace"):
        assert process.poll() is None and time.monotonic() < until, f"{path} never said: {line}"
        time.sleep(.5)


def numbers(row): return {name: value for name, value in row.items() if not any(word in name for word in CLOCK)}


def records(desk):
    "What runs leave, less what the machine decides: parameters, metrics, curves, and digests of weights."
    found = {}
    for path in sorted((desk.reports / "book/runs").glob("*/run.json")):
        record, key = json.loads(path.read_text()), path.parent.name
        plain = {name: value for name, value in record.items() if name not in MACHINE}
        curves = path.with_name("metrics.csv")
        rows = list(csv.DictReader(curves.open())) if curves.exists() else []
        weights = {each.name: hashlib.sha256(each.read_bytes()).hexdigest()[:12]
                   for each in sorted((desk.work / "book" / key).glob("*.safetensors"))}
        found[key] = plain | {"metrics": numbers(plain["metrics"]), "curves": [numbers(row) for row in rows], "weights": weights}
    return found


def differences(one, other):
    "Paths at which two records differ."
    if isinstance(one, dict) and isinstance(other, dict):
        return [f"{name}/{rest}".rstrip("/") for name in sorted({*one, *other})
                for rest in differences(one.get(name), other.get(name))]
    return [""] if json.dumps(one, sort_keys=True) != json.dumps(other, sort_keys=True) else []


def test_a_cancelled_job_and_a_dead_node_change_nothing(cluster):
    folder, began = Path(FOLDER), time.time()
    here, there = Desk(folder / "here"), Desk(folder / "there")
    words = "--executor", "slurm", "--profile", profile(folder)
    logs = {arm: there.work / f"book/logs/train-{arm}-s0.log" for arm in ("grpo", "srpo")}
    harms, process = [], begin(there, *words)
    for arm, harm in (("grpo", "job cancelled"), ("srpo", "node killed")):
        wait_for("step 5 of 12", logs[arm], process)
        (job, (rule, node)), = [item for item in cluster.jobs().items() if item[1][0] == f"train_{arm}_s0"]
        if arm == "grpo": said("scancel", job)
        else: cluster.kill_node(node)
        harms.append({"harm": harm, "job": int(job), "rule": rule, "node": node})
    sentence = process.communicate()[1].strip()
    attempts = [{"harms": harms, "code": process.returncode, "said": sentence}]
    for harm, state in zip(harms, ("CANCELLED", "NODE_FAIL"), strict=True):
        assert f"{harm['rule']} (job {harm['job']}, {state})" in sentence, sentence
    assert process.returncode == 1 and "\n" not in sentence
    process = begin(there, *words)
    sentence = process.communicate()[1].strip()
    attempts.append({"harms": [], "code": process.returncode, "said": sentence})
    assert process.returncode == 0, sentence
    for log in logs.values(): assert "continuing from checkpoint-" in log.read_text()
    whole = here.run(*BOOK)
    assert whole.returncode == 0, whole.stderr
    one, other = records(here), records(there)
    different = differences(one, other)
    commit, dirty = code_state()
    compared = {"records": len(one), "metrics": sum(len(each["metrics"]) for each in one.values()),
                "rows_of_curves": sum(len(each["curves"]) for each in one.values()),
                "files_of_weights": sum(len(each["weights"]) for each in one.values()), "different": different}
    packages = ("snakemake", "snakemake-executor-plugin-slurm", "snakemake-executor-plugin-slurm-jobstep")
    record = {"date": time.strftime("%Y-%m-%d"), "commit": commit, "dirty": dirty, "command": " ".join(BOOK),
              "slurm": said("slurmctld", "-V").split()[-1], "versions": {name: version(name) for name in packages},
              "nodes": cluster.states(), "attempts": attempts, "jobs": cluster.history(), "compared": compared,
              "seconds": round(time.time() - began)}
    atomic_write(ROOT / "reports/clusters/slurm.json", json.dumps(record, indent=1) + "\n")
    assert one.keys() == other.keys() and not different
    assert {row["nodes"] for row in record["jobs"]} == {"n1", "n2"}


def test_two_machines_share_the_ranks_of_a_training(cluster):
    """SRPO again, from the first step, in two ranks that meet by gloo: rounding apart, what one rank learnt. Then the command is
    ended, and what it had submitted is withdrawn."""
    for node, state in cluster.states().items():
        if state != "idle": cluster.start_node(node)
    desk, key = Desk(Path(FOLDER) / "there"), "train-srpo-s0"
    before = Path(FOLDER, "one.json")   # what one rank learnt, kept for a second try of this test
    if not before.exists(): atomic_write(before, json.dumps(records(desk)[key]))
    one = json.loads(before.read_text())
    for folder in (desk.work / "book" / key, desk.reports / "book/runs" / key): shutil.rmtree(folder, ignore_errors=True)
    words = "--executor", "slurm", "--profile", profile(Path(FOLDER)), "--nodes", "2", "-p", "ranks", "2"
    process = begin(desk, *words)
    wait_for("versions", desk.reports / "book/runs" / key / "run.json", process)
    while not any(rule == "report_all_s0" for rule, _ in cluster.jobs().values()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(1)
    process.terminate()
    while cluster.jobs(): time.sleep(1)
    device = json.loads((desk.reports / "book/runs" / key / "run.json").read_text())["device"]
    job = next(row for row in reversed(cluster.history()) if row["rule"] == "train_srpo_s0")
    two = records(desk)[key]
    names = ("reward", "loss", "entropy", "grad_norm", "all_steps")
    first = {name: [float(each["curves"][0][name]) for each in (one, two)] for name in names if name in one["curves"][0]}
    commit, dirty = code_state()
    record = {"date": time.strftime("%Y-%m-%d"), "commit": commit, "dirty": dirty, "command": " ".join([*BOOK, *words[4:]]),
              "job": job, "withdrawn": cluster.history()[-1], "device": device, "first_step_of_one_and_two_ranks": first,
              "rewards": [[float(row["reward"]) for row in each["curves"]] for each in (one, two)]}
    atomic_write(ROOT / "reports/clusters/nodes.json", json.dumps(record, indent=1) + "\n")
    assert record["withdrawn"]["rule"] == "report_all_s0" and record["withdrawn"]["state"] == "CANCELLED"
    assert job["nodes"] == "n[1-2]" and device.endswith("2 ranks")
    for left, right in first.values(): assert left == pytest.approx(right, rel=1e-3, abs=1e-5)
