"Stages that train and ask by vLLM, in kernels of their own as the book runs them. Part of `make test-vllm`."
import pandas as pd
import pytest
from parts import distance, note

from she_nb.book.records import read_record
from she_nb.book.stages import run_stage
from she_nb.policy.engines import Sampling, TransformersEngine
from she_nb.policy.models import load_policy
from she_nb.policy.synced import APART
from she_nb.shop.judged import rl_prompts
from she_nb.task import BookError, prompt

NEAR = 1e-3   # as in check_engines
LEARNT = {"hidden_size": 64, "sft_steps": 120, "teacher": "truth"}   # heads of 32, and chains that are right now and then
STEPS, GROUP = 4, 4


def stage(name, folder, **arguments):
    "The result of a stage and its record."
    out, record = folder / name / "out", folder / name / "record"
    run_stage(name, arguments | {"out": str(out), "record": str(record)}, folder / name / f"{name}.ipynb")
    return out, record


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("stage")


@pytest.fixture(scope="module")
def data(folder): return stage("data", folder)[0]


@pytest.fixture(scope="module")
def start(folder, data): return stage("sft", folder, data_dir=str(data), **LEARNT)[0]


@pytest.fixture(scope="module")
def small(folder, data): return stage("sft", folder / "small", data_dir=str(data), sft_steps=2)[0]   # heads of 16


@pytest.mark.parametrize("arm", ["srpo", "grpo", "ppo"])
def test_an_arm_learns_from_what_vllm_samples(folder, data, start, arm):
    out, record = stage("train", folder / arm, data_dir=str(data), model_dir=str(start), arm=arm, engine="vllm", rl_steps=STEPS,
                        prompts_per_step=8, group_size=GROUP, rl_lr=4e-3, watch_every=2)
    run, rows = read_record(record / "run.json"), pd.read_csv(record / "metrics.csv")
    (before, tokenizer), (after, _) = load_policy(start), load_policy(out)
    texts = [prompt(pair.query, pair.item, "brief") for pair in rl_prompts(str(data))[:8]]
    ids, sampling = tokenizer(texts, add_special_tokens=False)["input_ids"], Sampling(limit=48, temperature=1.0)
    drawn = [group[0] for group in TransformersEngine(after, tokenizer).sampled(ids, 1, sampling)]
    moved = distance(before, [(asked, one.ids, one.logps) for asked, one in zip(ids, drawn, strict=True)])
    kept = ("sampling_gap", "sampling_gap_largest", "sampling_weight_least", "sampling_weight_most", "reward", "advantage_std")
    note(f"stage train, {arm}", model="qwen3, 2 layers, width 64, heads of 32, by the stage sft", engine=run.parameters["engine"],
         steps=len(rows), responses=int(run.metrics["rollouts"]), from_the_first_weights_at_the_end=moved,
         **{name: rows[name].tolist() for name in kept})
    assert run.parameters["engine"] == "vllm" and len(rows) == STEPS and rows["advantage_std"].max() > 0
    assert rows["sampling_gap_largest"].max() < NEAR
    assert (rows[["sampling_weight_least", "sampling_weight_most"]] - 1).abs().max().max() < NEAR
    assert moved > APART                                    # where an engine left behind would be
    assert {"held_macro_f1", "step_seconds"} <= set(rows) and run.metrics["sampling_gap"] < NEAR


def test_a_stage_that_only_asks_is_answered_by_vllm(folder, data, start):
    _, record = stage("ask", folder, data_dir=str(data), model_dir=str(start), answer_engine="vllm", select_pairs=8)
    run = read_record(record / "run.json")
    note("stage ask", engine=run.parameters["answer_engine"], **{name: run.metrics[name] for name in ("rollouts", "pass_rate")})
    assert run.parameters["answer_engine"] == "vllm"


@pytest.mark.parametrize(("name", "engine"), [("train", "engine"), ("ask", "answer_engine")])
def test_a_shape_that_vllm_refuses_is_one_sentence(folder, data, small, name, engine):
    with pytest.raises(BookError, match="vLLM can't .*this model.*(set engine = shared|take engine = transformers)") as error:
        stage(name, folder / "refused", data_dir=str(data), model_dir=str(small), **{engine: "vllm"})
    note("refused", **{name: str(error.value).replace(str(small), "FOLDER")})
    assert len(str(error.value)) < 300
