"""The micro book on a real Slurm of two nodes: a job is cancelled, a node dies, and the same command ends with the records of
a run on this machine. Its policy is fine-tuned until some of its answers are right, so that every arm has rewards to learn
from. Minutes of both cores: `make test-slurm` runs it, in the folder that SHE_NB_SLURM names."""
import csv
import hashlib
import json
import os
import shutil
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, Desk
from loopback import Loopback, missing, said
from safetensors.numpy import load_file

from she_nb.book.records import code_state
from she_nb.task import atomic_write

FOLDER = os.environ.get("SHE_NB_SLURM", "")
REASON = missing() if FOLDER else "it takes minutes of all cores: make test-slurm runs it"
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)

SETTINGS = {"start": "sft", "reward": "oracle", "curriculum": "single",   # the shortest graph
            "sft_steps": 200, "sft_lr": 1e-2, "sft_muon_lr": 2e-2,    # until its answers have the form of a chain
            "max_completion": 96}                                     # and room for it
BOOK = "book", "--preset", "micro", *(word for name, value in SETTINGS.items() for word in ("-p", name, str(value)))
ARMS = "grpo", "srpo"
MACHINE = ("seconds", "peak_rss_mb", "device", "commit", "dirty", "versions")  # of a record
CLOCK = ("second", "time")  # in the name of a metric


@pytest.fixture(scope="module")
def cluster():
    with Loopback(Path(FOLDER, "slurm")) as cluster: yield cluster


def profile(folder):
    "The book's own, but asking often, and for little memory."
    written = yaml.safe_load((ROOT / "profiles/slurm/config.yaml").read_text())
    written |= {"slurm-init-seconds-before-status-checks": 5, "latency-wait": 20}
    written["default-resources"]["mem_mb"] = 1500
    return atomic_write(folder / "profile/config.yaml", yaml.safe_dump(written)).parent


@pytest.fixture
def begin(cluster):
    "Starts the book; what still runs at the end of a test is ended."
    processes = []
    def start(desk, *words):
        processes.append(subprocess.Popen(desk.words(*BOOK, *words), cwd=ROOT, env=desk.env, text=True,
                                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
        return processes[-1]
    yield start
    for process in processes: process.terminate()
    for process in processes: process.wait()


def wait_for(line, paths, process, seconds=3600):
    "The first file that has a line."
    until = time.monotonic() + seconds
    while True:
        for path in paths:
            if path.exists() and line in path.read_text(errors="replace"): return path
        assert process.poll() is None and time.monotonic() < until, f"{paths} never said: {line}"
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
        files = {each.name: hashlib.sha256(each.read_bytes()).hexdigest()[:12]
                 for each in sorted((desk.work / "book" / key).glob("*.safetensors"))}
        found[key] = plain | {"metrics": numbers(plain["metrics"]), "curves": [numbers(row) for row in rows], "weights": files}
    return found


def weights(desk, key):
    "A model's numbers, in one row."
    tensors = load_file(desk.work / "book" / key / "model.safetensors")
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def keep(name, record):
    "A record of what was run, with day and commit."
    commit, dirty = code_state()
    record = {"date": time.strftime("%Y-%m-%d"), "commit": commit, "dirty": dirty} | record
    atomic_write(ROOT / f"reports/clusters/{name}.json", json.dumps(record, indent=1) + "\n")


def differences(one, other):
    "Paths at which two records differ."
    if isinstance(one, dict) and isinstance(other, dict):
        return [f"{name}/{rest}".rstrip("/") for name in sorted({*one, *other})
                for rest in differences(one.get(name), other.get(name))]
    return [""] if json.dumps(one, sort_keys=True) != json.dumps(other, sort_keys=True) else []


def learning(found):
    "Of every arm: its reward and the size of its gradient, step by step."
    return {arm: {name: [float(row[name]) for row in found[f"train-{arm}-s0"]["curves"] if row.get(name)]
                  for name in ("reward", "grad_norm")} for arm in ARMS}


def assert_it_learnt(found):
    "Else equal weights would say little: they would be those of the first model."
    models = [found[key]["weights"]["model.safetensors"] for key in ("sft-sft-s0", *(f"train-{arm}-s0" for arm in ARMS))]
    assert len({*models}) == len(models)
    for arm, curve in learning(found).items():
        rewarded, moved = ([value for value in curve[name] if value] for name in ("reward", "grad_norm"))
        assert len(curve["reward"]) == 12 and len({*rewarded}) > 1, (arm, curve)
        assert len(moved) >= 6 and len({*moved}) == len(moved), (arm, curve)


def test_a_cancelled_job_and_a_dead_node_change_nothing(cluster, begin):
    folder, began = Path(FOLDER), time.time()
    for name in ("here", "there"): shutil.rmtree(folder / name, ignore_errors=True)
    here, there = Desk(folder / "here"), Desk(folder / "there")
    local = begin(here)   # meanwhile
    words = "--executor", "slurm", "--profile", profile(folder)
    logs = [there.work / f"book/logs/train-{arm}-s0.log" for arm in ARMS]
    left, harms, process = [*logs], [], begin(there, *words)
    for harm in ("job cancelled", "node killed"):   # whichever training comes so far first
        log = wait_for("step 5 of 12", left, process)
        left.remove(log)
        (job, (rule, node)), = [item for item in cluster.jobs().items() if item[1][0] == log.stem.replace("-", "_")]
        if left: said("scancel", job)
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
    for log in logs: assert "continuing from checkpoint-" in log.read_text()
    sentence = local.communicate()[1].strip()
    assert local.returncode == 0, sentence
    one, other = records(here), records(there)
    different = differences(one, other)
    compared = {"records": len(one), "metrics": sum(len(each["metrics"]) for each in one.values()),
                "rows_of_curves": sum(len(each["curves"]) for each in one.values()),
                "files_of_weights": sum(len(each["weights"]) for each in one.values()), "different": different}
    packages = ("snakemake", "snakemake-executor-plugin-slurm", "snakemake-executor-plugin-slurm-jobstep")
    record = {"command": " ".join(BOOK), "slurm": said("slurmctld", "-V").split()[-1],
              "versions": {name: version(name) for name in packages}, "nodes": cluster.states(), "attempts": attempts,
              "jobs": cluster.history(), "compared": compared, "learnt": learning(one), "seconds": round(time.time() - began)}
    keep("slurm", record)
    assert one.keys() == other.keys() and not different
    assert_it_learnt(one)
    assert {row["nodes"] for row in record["jobs"]} == {"n1", "n2"}


def test_two_machines_share_the_ranks_of_a_training(cluster, begin):
    """SRPO again, from the first step, in two ranks that meet by gloo: rounding apart, what one rank learnt. Then the command is
    ended, and what it had submitted is withdrawn."""
    for node, state in cluster.states().items():
        if state != "idle": cluster.start_node(node)
    here, desk, key = Desk(Path(FOLDER) / "here"), Desk(Path(FOLDER) / "there"), "train-srpo-s0"
    for run in (key, "evaluate-srpo-s0"):
        for folder in (desk.work / "book" / run, desk.reports / "book/runs" / run): shutil.rmtree(folder, ignore_errors=True)
    words = "--executor", "slurm", "--profile", profile(Path(FOLDER)), "--nodes", "2", "-p", "ranks", "2"
    began, process = time.time(), begin(desk, *words)
    wait_for("versions", [desk.reports / "book/runs" / key / "run.json"], process)
    while not any(rule == "evaluate_srpo_s0" for rule, _ in cluster.jobs().values()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(1)
    process.terminate()
    while cluster.jobs(): time.sleep(1)
    device = json.loads((desk.reports / "book/runs" / key / "run.json").read_text())["device"]
    job = next(row for row in reversed(cluster.history()) if row["rule"] == "train_srpo_s0")
    withdrawn = [row for row in cluster.history() if row["job"] > job["job"]]
    one, two = (records(each)[key]["curves"] for each in (here, desk))
    first, alone, shared = (weights(where, name) for where, name in ((here, "sft-sft-s0"), (here, key), (desk, key)))
    apart = float(np.linalg.norm(shared - alone) / np.linalg.norm(alone - first))
    record = {"command": " ".join([*BOOK, *words[4:]]), "job": job, "withdrawn": withdrawn, "device": device,
              "curves_of_one_and_two_ranks": {name: [[float(row[name]) for row in rows if row[name]] for rows in (one, two)]
                                              for name in ("reward", "loss", "grad_norm", "entropy")},
              "weights_apart": apart, "seconds": round(time.time() - began)}
    keep("nodes", record)
    assert {row["state"] for row in withdrawn} == {"CANCELLED"}
    assert job["nodes"] == "n[1-2]" and device.endswith("2 ranks")
    for left, right in record["curves_of_one_and_two_ranks"].values(): assert left == pytest.approx(right, rel=1e-3, abs=1e-5)
    assert_it_learnt(records(here))
    assert 0 < apart < .01   # of the way from the first model; the same sums, in another order
