"""Several processes make the batch of one and learn what it learns; one that dies ends the job, which goes on where it stood."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from she_nb.book.launch import launch
from she_nb.book.stages import StageError

CASES = ("grpo", "srpo", "judge", "refill", "ppo")  # of ranks.py; the last two sample by pass rate and replace unanimous groups
RANKS = """
import os, runpy, sys
os.environ["CUDA_VISIBLE_DEVICES"], sys.argv = "", {arguments}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    "Four steps of every case in one, two and three processes, of one that was killed and continued, and with spread weights."
    out = tmp_path_factory.mktemp("ranks")
    script, root = Path(__file__).parent / "ranks.py", Path(__file__).parent.parent
    path = os.pathsep.join(map(str, filter(None, [root, script.parent, os.environ.get("PYTHONPATH")])))
    words = "-m", "she_nb.book.kernels", "python", "-c", RANKS.format(arguments=[str(script), str(out)])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    def read(folder): return [torch.load(path, weights_only=True) for path in sorted((out / folder).glob("[0-9].pt"))]
    return read


def same(one, several, weights=1e-5):
    "One trajectory: what was sampled, the log, and the last weights."
    for step, whole in enumerate(one["seen"]):
        assert [row for rank in several for row in rank["seen"][step]] == whole
    names = ("reward", "loss", "grad_norm", "entropy", "all_steps", "advantage_std", "advantage_mean", "prompts_asked",
             "value_loss", "explained_variance", "learning_rate")
    for left, right in zip(one["rows"], several[0]["rows"], strict=True):
        for name in names: assert left.get(name, 0) == pytest.approx(right.get(name, 0), rel=1e-3, abs=1e-5, nan_ok=True), name
    assert several[0]["weights"].keys() == one["weights"].keys()   # of spread ones the first rank has all, the others none
    for rank in several:
        for name, weight in rank["weights"].items(): assert (one["weights"][name] - weight).abs().max() < weights, name
        assert (rank["critic"] - one["critic"]).abs().max() < weights


@pytest.mark.parametrize(("case", "ranks"), [*((case, 2) for case in CASES), ("srpo", 3), ("ppo", 3)])
def test_several_ranks_learn_what_one_learns(runs, case, ranks):
    "Eight prompts in groups of three: two ranks have four prompts each, three ranks have groups that straddle."
    (one,), several = runs(f"{case}-1"), runs(f"{case}-{ranks}")
    assert [rank["ranks"] for rank in several] == [ranks] * ranks
    assert len({str(ids) for _, ids in one["seen"][0]}) > 8 and len({row["reward"] for row in one["rows"]}) > 1
    same(one, several)
    if case in CASES[3:]: assert max(row["prompts_asked"] for row in one["rows"]) > 8


def test_a_job_that_was_killed_continues_as_if_it_never_was(runs):
    whole, again = runs("ppo-2"), runs("killed")
    assert [row["step"] for row in again[0]["rows"]] == [1, 2, 3, 4] and len(again[0]["seen"]) == 2  # of four steps
    for one, other in zip(whole, again, strict=True):
        assert other["seen"] == one["seen"][2:] and torch.equal(one["critic"], other["critic"])
        for name, weight in one["weights"].items(): assert torch.equal(weight, other["weights"][name]), name
    assert whole[0]["rows"] == again[0]["rows"]


def test_spread_weights_learn_what_whole_ones_learn(runs):
    "FSDP2, with refilling, where ranks sample other numbers of responses."
    (one,), spread = runs("ppo-1"), runs("ppo-fsdp2")
    assert {rank["kind"] for rank in spread} == {"DistributedType.FSDP"}
    same(one, spread)


# Responses in groups of four, six in each of two processes; a group straddles

@pytest.mark.parametrize("micro", [6, 3])
def test_groups_that_straddle_two_processes_have_the_advantages_of_one(runs, micro):
    (one,), ranks = runs("scripted"), runs(f"scripted-{micro}")
    assert one["processes"] == 1 and [rank["processes"] for rank in ranks] == [2, 2]
    varied = 0
    for step, whole in enumerate(one["batches"]):
        parts = [rank["batches"][step] for rank in ranks]
        assert parts[0]["row"] + parts[1]["row"] == whole["row"] and parts[0]["row"][-1] == parts[1]["row"][0]
        place = 0
        for part in parts:
            of_part = (part[name] for name in ("completion_ids", "completion_mask", "advantages"))
            for ids, mask, actual in zip(*of_part, strict=True):
                length = int(mask.sum())
                assert ids[:length].tolist() == whole["completion_ids"][place][:length].tolist()
                torch.testing.assert_close(actual[:length], whole["advantages"][place][:length], atol=1e-6, rtol=0)
                assert whole["completion_mask"][place].sum() == length and not actual[length:].any()
                varied += bool(actual.std() > 0.1)
                place += 1
    assert varied > 20 and place == 12


@pytest.mark.parametrize("micro", [6, 3])
def test_two_processes_learn_what_one_learns(runs, micro):
    (one,), ranks = runs("scripted"), runs(f"scripted-{micro}")
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])
    assert (ranks[0]["weights"] - one["weights"]).abs().max() < 1e-6
    names = ("reward", "all_steps", "well_formed", "advantage_mean", "advantage_std", "grad_norm", "loss")
    for left, right in zip(one["rows"], ranks[0]["rows"], strict=True):
        for name in names: assert left[name] == pytest.approx(right[name], rel=1e-4, abs=1e-6), name


def test_two_processes_say_what_one_says(runs):
    (one,), ranks = runs("sampled"), runs("sampled-2")
    whole, halves = one["batches"][0], [rank["batches"][0] for rank in ranks]
    responses = [ids[mask.bool()].tolist() for part in halves for ids, mask in
            zip(part["completion_ids"], part["completion_mask"], strict=True)]
    assert responses == [ids[mask.bool()].tolist() for ids, mask in
                    zip(whole["completion_ids"], whole["completion_mask"], strict=True)]
    assert len({str(ids) for ids in responses}) > 6


DYING = """
import os, signal, time
from pathlib import Path
def work():
    print("step 1 of 2", flush=True)
    printed = Path(__file__).with_name("printed")
    if os.environ["RANK"] == "0": printed.touch()
    while os.environ["RANK"] == "1":                     # dies once the first rank has printed
        if printed.exists(): os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(.05)
    time.sleep(100)
"""

def test_a_killed_rank_ends_the_job_with_one_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "dying.py").write_text(DYING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(StageError) as failed: launch("dying", "work", {}, tmp_path / "job", ranks=2)
    assert str(failed.value) == f"Rank 1 of 2 was killed by signal 9; see {tmp_path}/job/ranks.log."
    assert capsys.readouterr().out == "step 1 of 2\n" and "step 1 of 2" in (tmp_path / "job/ranks.log").read_text()
