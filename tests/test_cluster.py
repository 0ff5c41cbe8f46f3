"""A book on a cluster, as far as it shows without one: the command line that Slurm is given, and what is refused before. The real
thing, two nodes with jobs that are lost, is slurm/test_slurm.py."""
import shlex
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from conftest import ROOT, Desk, refused, write_stages

from she_nb.book.cli import main
from she_nb.book.clusters import read_cluster
from she_nb.book.graph import open_book, plan

BOOK = "book", "--preset", "micro", "-p", "start", "sft", "-p", "reward", "oracle", "-p", "curriculum", "single"
SBATCH = f"""#!{sys.executable}
import os, pathlib, sys
pathlib.Path(__file__).with_name("given").write_text("\\n".join([*sys.argv[1:], *map("=".join, os.environ.items())]))
sys.exit("sbatch: error: invalid partition specified: gup")
"""


@pytest.fixture
def queue(tmp_path):
    "A desk where Slurm's programs are scripts: the queue is empty, and no job is taken."
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sbatch", "squeue", "scontrol", "sinfo", "scancel", "sacct", "sacctmgr"):
        (programs / name).write_text(SBATCH if name == "sbatch" else "#!/bin/sh\n")
        (programs / name).chmod(0o755)
    write_stages(tmp_path / "stages")
    desk = Desk(tmp_path, tmp_path / "stages")
    desk.env["PATH"] = f"{programs}:{desk.env['PATH']}"
    return desk


@pytest.mark.skipif(not find_spec("snakemake_executor_plugin_slurm"), reason="snakemake-executor-plugin-slurm is not installed")
def test_what_slurm_is_given(queue):
    "A stage's resources, from the command line and by its name from a profile; and nothing that ties it to this machine."
    profile = queue.folder / "mine.yaml"
    profile.write_text("executor: slurm\nslurm-status-command: squeue\nslurm-init-seconds-before-status-checks: 1\n"
                       "default-resources: {mem_mb: 3000, slurm_partition: cpu}\n"
                       "set-resources: {data: {constraint: large}, train: {gres: 'gpu:8'}}\n")
    done = queue.run(*BOOK, "--profile", profile, "--time", "77", "--partition", "gup", "--gpus", "1")
    refused(done, "Slurm refused a job: invalid partition specified: gup; see the profile")
    given = (queue.folder / "bin/given").read_text().split("\n")
    words = shlex.join(given)
    for asked in ("--mem 3000", "-t 77", "-p gup", "-C large", "--cpus-per-task=1", "--comment rule_data_all_s0"):
        assert asked in words, asked
    assert not any(word.startswith(("--gpus", "--gres", "SHE_NB_WATCH=")) for word in given)  # data are made without a GPU
    assert "SHE_NB_KERNELS=off" in given
    job = next(word for word in given if word.startswith("--wrap="))
    assert "--allowed-rules data_all_s0" in job and "--executor slurm-jobstep" in job


class Resources(dict):
    "As Snakemake's: a mapping with attributes."
    __getattr__ = dict.__getitem__


@pytest.mark.skipif(not find_spec("snakemake_executor_plugin_slurm"), reason="snakemake-executor-plugin-slurm is not installed")
@pytest.mark.parametrize("nodes, asked, never", [
    (1, ("--gres=gpu:8", "--cpus-per-task=8"), ("--nodes", "--ntasks")),
    (2, ("--nodes=2", "--ntasks=2", "--gres=gpu:4", "--cpus-per-task=4"), ("--ntasks-per-gpu",))])
def test_eight_gpus_on_one_machine_and_on_two(nodes, asked, never):
    "The words of sbatch for a training in eight ranks."
    from snakemake_executor_plugin_slurm.submit_string import get_submit_command
    from snakemake_executor_plugin_slurm.utils import set_gres_string
    run = next(run for run in plan(open_book("tiny", ranks="8")) if run.stage == "train")
    cluster = read_cluster("slurm", gpus=1, nodes=nodes, partition="gpu")
    job = SimpleNamespace(resources=Resources(cluster.whole(run)), threads=run.cores, is_group=lambda: False)
    own = {"run_uuid": "x", "slurm_logfile": "log", "comment_str": "", "account": "", "partition": "-p gpu", "workdir": "."}
    words = get_submit_command(job, own) + set_gres_string(job)
    assert all(word in words.split() for word in asked), words
    assert not any(word in words for word in never), words


def test_what_a_dry_run_lists(queue, capsys, monkeypatch):
    monkeypatch.setenv("SHE_NB_STAGES", queue.env["SHE_NB_STAGES"])
    where = "--work", str(queue.work), "--reports", str(queue.reports)
    assert main([*BOOK, *where, "--executor", "slurm", "--gpus", "1", "--memory", "9", "--dry-run"]) == 0
    lines = {line.split()[1]: line.split()[3:] for line in capsys.readouterr().out.split("\n") if line.startswith("run ")}
    assert {"gres=gpu:1", "mem_mb=9000", "threads=1"} <= {*lines["train-srpo-s0"]}
    assert "gres=gpu:1" in lines["evaluate-sft-s0"] and "gres=gpu:1" not in lines["data-all-s0"] + lines["report-all-s0"]
    assert queue.files() == []


@pytest.mark.parametrize("words, said", [
    (["--executor", "abacus"], "The executor abacus is not installed here; pip install snakemake-executor-plugin-abacus"),
    (["--executor", "a b"], "is no name"),
    (["--profile", "profiles/slrum"], "--profile profiles/slrum: there is no such file"),
    (["--executor", "slurm", "--profile", "profiles/kubernetes"], "name one cluster"),
    (["--gpus", "2"], "--gpus is for jobs on a cluster"),
    (["--executor", "slurm", "--memory", "0"], "--memory = 0 is less than one"),
    (["--executor", "slurm", "--time", "4h"], "invalid int value: '4h'"),
    (["--executor", "kubernetes", "--nodes", "2"], "--nodes is for Slurm"),
    (["--executor", "kubernetes", "--partition", "gpu"], "--partition is for Slurm"),
])
def test_what_is_refused(queue, capsys, monkeypatch, words, said):
    "One sentence, and nothing written."
    monkeypatch.setenv("SHE_NB_STAGES", queue.env["SHE_NB_STAGES"])
    assert main([*BOOK, "--work", str(queue.work), "--reports", str(queue.reports), *words]) == 2
    sentence = capsys.readouterr().err
    assert said in sentence and sentence.count("\n") == 1
    assert not list(queue.reports.rglob("*.json"))


def test_slurm_itself_is_missing(queue, capsys, monkeypatch):
    if not find_spec("snakemake_executor_plugin_slurm"): pytest.skip("snakemake-executor-plugin-slurm is not installed")
    monkeypatch.setenv("SHE_NB_STAGES", queue.env["SHE_NB_STAGES"])
    monkeypatch.setenv("PATH", str(queue.folder))
    assert main([*BOOK, "--work", str(queue.work), "--reports", str(queue.reports), "--executor", "slurm"]) == 2
    assert "There is no sbatch on this machine" in capsys.readouterr().err


PLUGINS = "snakemake_executor_plugin_kubernetes", "snakemake_storage_plugin_fs"

@pytest.mark.skipif(not all(map(find_spec, PLUGINS)), reason="Snakemake's plugins kubernetes and fs are not installed")
def test_snakemake_reads_the_profile_of_kubernetes(queue):
    "A dry run: no pod is started."
    words = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "Snakefile", "--profile", ROOT / "profiles/kubernetes",
             "--directory", queue.folder, "--dry-run", "--forceall", "--nolock", "--config", "gpus=1"]
    done = subprocess.run(list(map(str, words)), cwd=ROOT, env=queue.env, capture_output=True, text=True)
    assert done.returncode == 0 and "This was a dry-run" in done.stdout + done.stderr
    rule = (done.stdout + done.stderr).split("rule train_srpo_s0:")[1].split("rule ")[0]
    assert "gpu=1" in rule and "gpu_manufacturer=nvidia" in rule
