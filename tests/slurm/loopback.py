"""A Slurm of two nodes on one machine, from Debian's packages and without systemd: for tests, and for a try at home.
    python tests/slurm/loopback.py FOLDER     starts it, and ends it with Ctrl-C"""
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil

PROGRAMS = "munged", "mungekey", "slurmctld", "slurmd", "sbatch", "squeue"
CONFIG = Path("/etc/slurm/slurm.conf")   # a job's step looks nowhere else
TEXT = """# she-nb: two nodes on one machine, made by {here}
ClusterName=loop
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=16817
AuthType=auth/munge
AuthInfo=socket={base}/run/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
SlurmctldPidFile={base}/run/slurmctld.pid
SlurmdPidFile={base}/run/slurmd.%n.pid
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool/%n
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdLogFile={base}/log/slurmd.%n.log
# no cgroups, no accounts; jobs go to the node with least to do
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory,CR_LLN
MpiDefault=none
# a busy machine answers late; a node that is silent for a minute is dead, and its jobs are not started again
MessageTimeout=60
SlurmdTimeout=60
ReturnToService=2
JobRequeue=0
MinJobAge=36000
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port=16821 CPUs=2 RealMemory={memory}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port=16822 CPUs=2 RealMemory={memory}
PartitionName=cpu Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def missing():
    "Why there can be no Slurm here; empty where there can."
    if absent := [name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]:
        return f"{absent[0]} is not here; make test-slurm installs Debian's slurmctld, slurmd, slurm-client and munge"
    if not find_spec("snakemake_executor_plugin_slurm"): return "snakemake-executor-plugin-slurm is not installed"
    if os.getuid(): return "only root may start the nodes"
    if CONFIG.exists() and "made by" not in CONFIG.read_text().split("\n")[0]: return f"{CONFIG} is of another cluster"
    return ""


def said(*words): return subprocess.run(words, check=True, capture_output=True, text=True).stdout


class Loopback:
    "Two nodes, n1 and n2, while a `with` block runs."
    def __init__(self, folder): self.base = Path(folder).resolve()

    def __enter__(self):
        os.environ["PATH"] += ":/usr/sbin"
        self.end()   # what a killed test left
        for name in ("run", "log", "state", "spool/n1", "spool/n2"): (self.base / name).mkdir(parents=True, exist_ok=True)
        self.base.chmod(0o755)
        memory = psutil.virtual_memory().total // 2**20 // 2 - 1000
        CONFIG.parent.mkdir(exist_ok=True)
        CONFIG.write_text(TEXT.format(here=__file__, host=socket.gethostname(), base=self.base, memory=memory))
        key, run = self.base / "key", self.base / "run"
        if not key.exists(): said("mungekey", "--create", "--keyfile", str(key))
        own = {"key-file": key, "socket": run / "munge.socket", "pid-file": run / "munged.pid", "seed-file": run / "seed",
               "log-file": self.base / "log/munged.log"}
        said("munged", "--force", *(f"--{name}={path}" for name, path in own.items()))
        said("slurmctld", "-c")  # nothing of an earlier one
        for node in ("n1", "n2"): self.start_node(node)
        until = time.monotonic() + 120
        while self.states() != {"n1": "idle", "n2": "idle"}:
            assert time.monotonic() < until, self.states()
            time.sleep(1)
        return self

    def __exit__(self, *_):
        until = time.monotonic() + 60
        for job in self.jobs(): subprocess.run(["scancel", job])
        while self.jobs() and time.monotonic() < until: time.sleep(1)
        self.end()
        CONFIG.unlink()

    def end(self):
        "Its programs, as far as they run."
        for name in ("slurmd.n1", "slurmd.n2", "slurmctld", "munged"): self.kill(name)

    def kill(self, name):
        "One of its programs; a number in an old file may by now be another's."
        try: process = psutil.Process(int((self.base / f"run/{name}.pid").read_text()))
        except (OSError, ValueError, psutil.NoSuchProcess): return
        if process.name().startswith(name.split(".")[0]): process.kill()

    def start_node(self, node): said("slurmd", "-N", node)

    def states(self):
        lines = said("sinfo", "--Node", "--noheader", "--format", "%N %t").split("\n")
        return dict(line.split() for line in lines if line)

    def jobs(self):
        "Of what runs: number -> (rule, node)."
        lines = said("squeue", "--noheader", "--states=running", "--format", "%i|%k|%N").split("\n")
        return {number: (comment.removeprefix("rule_"), node) for number, comment, node in (x.split("|") for x in lines if x)}

    def history(self):
        "Of every job: number, rule, nodes and how it ended."
        rows = []
        for line in said("scontrol", "show", "jobs", "--oneliner", "--all").split("\n"):
            job = dict(word.split("=", 1) for word in line.split() if "=" in word)
            if "JobId" not in job: continue
            rule = job.get("Comment", "").removeprefix("rule_")
            rows.append({"job": int(job["JobId"]), "rule": rule, "nodes": job["NodeList"], "state": job["JobState"]})
        return sorted(rows, key=lambda row: row["job"])

    def kill_node(self, node):
        "A node dies, and all that runs on it: as if its power failed."
        numbers = [number for number, (_, place) in self.jobs().items() if place == node]
        steps = [process for process in psutil.process_iter(["cmdline"])
                 if any(f"slurmstepd: [{number}." in " ".join(process.info["cmdline"] or []) for number in numbers)]
        processes = [each for step in steps for each in (step, *step.children(recursive=True))]
        self.kill(f"slurmd.{node}")
        for process in processes:
            try: process.kill()
            except psutil.NoSuchProcess: continue


if __name__ == "__main__":
    if reason := missing(): sys.exit(reason)
    with Loopback(sys.argv[1]) as cluster:
        print(cluster.states(), flush=True)
        try: signal.pause()
        except KeyboardInterrupt: print("ended")
