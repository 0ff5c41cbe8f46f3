"From shop to shop: made records of known outcome, and the study that says what is in them."
import gzip
import json

import numpy as np
import pandas as pd
import pytest

from she_nb.book.graph import open_book, plan
from she_nb.book.stages import run_stage
from she_nb.evidence.evaluate import read_records
from she_nb.evidence.metrics import CONCLUSIONS, STEP_COLUMNS
from she_nb.evidence.transfer import (
    MEASURES,
    SHOWN,
    answer_sentence,
    known_interval,
    measure_moves,
    transfer_name,
    verdict_counts,
)

SHOPS, HOME = ("shop-lamps", "shop-tea"), [.95, .94, .96, .93, .92]


def predictions(seed, rates, pairs=200):
    "Right steps at these rates; a policy of the same seed stumbles over the same pairs."
    draws = np.random.default_rng(seed).random((pairs, 5)) < np.array(rates)
    table = pd.DataFrame(draws.astype(float), columns=list(STEP_COLUMNS)).assign(
        set="balanced", id=range(pairs), query_type="plain", candidate="seed", wishes=1, well_formed=1,
        tier_true=[1, 2, 3, 4] * (pairs // 4), **dict.fromkeys(CONCLUSIONS, 1))
    return table.assign(follows_3=table["step_3"], follows_4=table["step_4"],
                        tier_pred=(table["tier_true"] * table["step_5"]).astype(int))


def write(folder, rates, seeds=(0, 1, 2), edit=None):
    "rates: (arm, trained, tested) -> five rates; edit changes a table before it is written."
    for move, seed in ((move, seed) for move in rates for seed in seeds):
        name = transfer_name(*move)
        run = folder / f"runs/evaluate-{name}-s{seed}"
        run.mkdir(parents=True)
        (run / "run.json").write_text(json.dumps({"stage": "evaluate", "arm": name, "seed": seed, "metrics": {}}))
        table = predictions(seed, rates[move])
        if edit: table = edit(move, table)
        (run / "predictions.csv.gz").write_bytes(gzip.compress(table.to_csv(index=False).encode()))
    return read_records(folder)


def everywhere(away, arm="sft"): return {(arm, a, b): HOME if a == b else away for a in SHOPS for b in SHOPS}


@pytest.mark.parametrize("away, said", [
    ([.4, .5, *HOME[2:]], "steps 1 and 2 drop in every move (by 4"),
    ([.1] * 5, "steps 1, 2, 3, 4 and 5 drop in every move (by 8")])
def test_the_sentence_says_what_was_made(tmp_path, away, said):
    moves = measure_moves(write(tmp_path, everywhere(away)), SHOWN)
    assert said in answer_sentence(moves)
    expected = ["holds" if theirs == ours else "drops" for ours, theirs in zip(HOME, away, strict=True)]
    counts = verdict_counts(moves, SHOWN)
    assert [counts.loc[name, verdict] for name, verdict in zip(SHOWN, expected, strict=True)] == [2] * 5


def test_one_strange_shop_is_no_rule(tmp_path):
    "Step 3 breaks in one of two moves, and the sentence counts them."
    rates = everywhere(HOME) | {("sft", "shop-tea", "shop-lamps"): [*HOME[:2], .3, *HOME[3:]]}
    said = answer_sentence(measure_moves(write(tmp_path, rates), SHOWN))
    assert "step 3 holds in 1 and drops in 1 of 2 moves" in said and "steps 1, 2, 4 and 5 hold in every move" in said


def test_one_seed_decides_nothing(tmp_path):
    moves = measure_moves(write(tmp_path, everywhere([.1] * 5), seeds=(0,)), SHOWN)
    assert set(moves["verdict"]) == {"home", "undecided"}
    assert "1 seed, SFT: steps 1, 2, 3, 4 and 5 are undecided" in answer_sentence(moves)


def test_the_interval_is_of_known_rates():
    "Away 40 of 100 and home 95: the change is -55 points, by a table made without the chapter."
    home, away = ({seed: predictions(seed, rates) for seed in range(5)} for rates in (HOME, [.4, *HOME[1:]]))
    effect = known_interval(away, MEASURES["step_1"], home)
    by_hand = np.mean([away[seed]["step_1"].mean() - home[seed]["step_1"].mean() for seed in range(5)])
    assert effect.mean == pytest.approx(by_hand) and effect.low < -.55 < effect.high


def test_a_shop_whose_items_tell_nothing(tmp_path):
    "No truth of step 4 in one shop, and there chains that nobody can read: both are told as such, and the study is drawn."
    def edit(move, table):
        if move[2] == "shop-lamps": return table
        unreadable = dict.fromkeys((*STEP_COLUMNS, "tier_pred"), 0) | dict.fromkeys(("follows_3", "follows_4"), np.nan)
        return table.assign(**unreadable if move[1] != move[2] else {}).assign(step_4=np.nan, lenient_4=np.nan)
    write(tmp_path, everywhere(HOME) | everywhere(HOME, "srpo"), seeds=(0, 1), edit=edit)
    places = {"reports": str(tmp_path), "out": str(tmp_path / "out"), "record": str(tmp_path / "record")}
    run_stage("shops", places, tmp_path / "shops.ipynb")
    numbers = json.loads((tmp_path / "record/run.json").read_text())["metrics"]
    at_home = np.mean([predictions(seed, HOME)["step_1"].mean() for seed in (0, 1)])
    assert numbers["sft/shop-lamps/shop-tea/step_1/change"] == pytest.approx(-at_home)
    assert numbers["sft/shop-tea/shop-lamps/step_4/change"] == 0
    assert "sft/shop-lamps/shop-tea/step_4" not in numbers and (tmp_path / "out/figures/shops.svg").is_file()
    assert "step 4 holds in 1 and can't be told in 1 of 2 moves" in (tmp_path / "shops.ipynb").read_text()


def test_a_shop_is_the_shortest_training():
    "Data, a first model and one training for each seed; no judge, no preferences, no selected prompts."
    runs = plan(open_book("tiny-shop", name="shop-lamps", seeds="0"))
    assert {run.key for run in runs if run.writes_checkpoint} == {"data-all-s0", "sft-sft-s0", "train-srpo-s0"}
