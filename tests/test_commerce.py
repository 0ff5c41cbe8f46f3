"What a ranking sells: the simulator against sums done by hand, and a commercial term that never competes with relevance."
import gzip
import json

import numpy as np
import pandas as pd
import pytest

from she_nb.book.graph import open_book, plan
from she_nb.book.stages import run_stage
from she_nb.evidence.commerce import RANKINGS, WITHIN, Pages, page_numbers, ranking_scores
from she_nb.learning.shoppers import (
    Shoppers,
    form_level,
    market,
    popularity,
    position_power,
    product_offers,
    read_level,
    value_factor,
    visit,
    with_level,
)
from she_nb.shop.catalog import embedded
from she_nb.task import SIGNS, parse
from she_nb.verifier import prediction


@pytest.fixture(scope="module")
def offers(): return product_offers(embedded().products)


def random_pages(seed, pages=300, results=8):
    rng = np.random.default_rng(seed)
    tier, said, level = (rng.integers(low, high, (pages, results)) for low, high in ((1, 5), (0, 5), (0, 3)))
    place, told = rng.random((2, pages, results))
    price = rng.uniform(5, 500, (pages, results))
    return Pages(tier, said, level, price, rng.exponential(1, price.shape), price * place, place, told)


def order_of(scores): return np.argsort(-scores, axis=1, kind="stable")


def test_three_results_by_hand():
    "Looks 1, 1/2, 1/3; clicks 1, 0.1 + 0.9 / 7, 0.1; purchases 4, 2, 1 of a hundred; the middle item wanted half as much."
    page = Pages(*(np.array([row]) for row in ([4, 2, 1], [1, 2, 4], [1, 1, 1], [10., 20., 30.], [1., .5, 1.], [10., 10., 30.],
                                               [.2, .4, .6], [.2, .4, .6])))
    right = page_numbers(page, np.array([[3., 2., 1.]]), Shoppers())
    sold = [1 * 1 * .04, 1 / 2 * (.1 + .9 / 7) * .02 * .5, 1 / 3 * .1 * .01]
    assert right["orders"] == pytest.approx(1000 * sum(sold))
    assert right["gmv"] == pytest.approx(1000 * (sold[0] * 10 + sold[1] * 20 + sold[2] * 30))
    assert right["ndcg"] == pytest.approx(1)
    wrong = page_numbers(page, ranking_scores(page, "relevance", 0, Shoppers()), Shoppers())   # the judge has it upside down
    assert wrong["gmv"] == pytest.approx(1000 * (.1 * .01 * 30 + sold[1] * 20 + 1 / 3 * .04 * 10))
    assert wrong["ndcg"] == pytest.approx((1 / np.log2(3) + 7 / 2) / (7 + 1 / np.log2(3)))


@pytest.mark.parametrize("power", [0.3, 1.0, 1.8])
def test_position_bias_is_recovered_from_clicks(offers, power):
    "Items of the catalogue in random order, a hundred visitors to each page."
    shoppers, rng = Shoppers(position=power), np.random.default_rng(1)
    shelf = market(offers, shoppers).sample(6000, replace=True, random_state=1)
    demand, prices = (shelf[name].to_numpy().reshape(-1, 10) for name in ("demand", "price"))
    chances = visit(rng.integers(1, 5, demand.shape), demand, prices, shoppers)["clicks"]
    assert position_power(rng.binomial(100, chances)) == pytest.approx(power, abs=.06)


def test_no_weight_is_pure_relevance():
    for seed in range(3):
        pages = random_pages(seed)
        relevance, blend = (ranking_scores(pages, way, 0.0, Shoppers()) for way in ("relevance", "blend"))
        assert (order_of(relevance) == order_of(blend)).all()
        assert page_numbers(pages, relevance, Shoppers()) == page_numbers(pages, blend, Shoppers())


@pytest.mark.parametrize(("ranking", "weight"), [("blend", WITHIN), ("signs", 0.0), ("price", 0.0)])
def test_a_term_within_tiers_never_crosses_them(ranking, weight):
    for seed in range(3):
        pages = random_pages(seed)
        order = order_of(ranking_scores(pages, ranking, weight, Shoppers()))
        assert (np.diff(np.take_along_axis(pages.said, order, 1), axis=1) <= 0).all()
    crossed = np.take_along_axis(pages.said, order_of(ranking_scores(pages, "blend", 1.0, Shoppers())), 1)
    assert (np.diff(crossed, axis=1) > 0).any() and set(RANKINGS) >= {ranking}


def test_no_sign_is_worth_a_tier():
    "Neither in the order nor in the reward; and the tier, its metrics and its verifier read a signed answer as they did."
    chain = "<query> lamps <item> lamps <category> lamps lamps same <attributes> none <tier> 3"
    for level, sign in enumerate(SIGNS):
        parsed = parse(with_level(chain, level))
        assert parsed.texts[4] == f"3{sign}" and read_level(parsed) == level and not parsed.malformed
    assert with_level(with_level(chain, 2), 0) == with_level(chain, 2)      # a sign is written once
    assert min(value_factor(said, true) for said in (0, 1, 2, None) for true in (0, 1, 2)) > 0
    assert {form_level(f"pair {n}") for n in range(50)} == {0, 1, 2}


def test_levels_order_the_items_of_a_shelf(offers):
    "Of two items of one category, the one of the higher level is worth more; and the tail is long."
    items = market(offers, Shoppers())
    for _, shelf in items.groupby("category"):
        assert list(shelf.sort_values("value")["level"]) == sorted(shelf["level"])
    assert items["demand"].mean() == pytest.approx(1, abs=.3)
    sold = np.sort([popularity(offer.id, Shoppers()) for offer in offers])
    assert sold[-len(sold) // 10:].sum() > .3 * sold.sum()


def test_the_study_runs_on_records(tmp_path):
    "Two seeds of three judges and of the arms with signs, made up from the catalogue: the page says what each of them sells."
    lamps = [product for product in embedded().products if product.category[-1] in ("lamps", "boots")]
    rng = np.random.default_rng(0)
    for seed in (0, 1):
        for arm, errors in {"sft": .4, "grpo": .2, "srpo": .1, "srpo_unvalued": .1, "srpo_valued": .1}.items():
            tiers = rng.integers(1, 5, len(lamps))
            said = np.where(rng.random(len(lamps)) < errors, rng.integers(1, 5, len(lamps)), tiers)
            rows = pd.DataFrame({"set": "wild", "id": [f"00000000-{product.id}" for product in lamps], "tier_true": tiers,
                                 "tier_pred": said} | ({"level": rng.integers(0, 3, len(lamps))} if "valued" in arm else {}))
            folder = tmp_path / f"runs/evaluate-{arm}-s{seed}"
            folder.mkdir(parents=True)
            record = {"stage": "evaluate", "arm": arm, "seed": seed, "metrics": {}}
            (folder / "run.json").write_text(json.dumps(record))
            (folder / "predictions.csv.gz").write_bytes(gzip.compress(rows.to_csv(index=False).encode()))
    places = {"reports": str(tmp_path), "out": str(tmp_path / "out"), "record": str(tmp_path / "record")}
    run_stage("commerce", places, tmp_path / "commerce.ipynb")
    numbers = json.loads((tmp_path / "record/run.json").read_text())["metrics"]
    assert numbers["truth 0/ndcg"] == pytest.approx(1) and numbers["before/gmv_change"] == 0
    assert numbers["srpo 0.3/seeds"] == 2 and "srpo_valued, signs/gmv_change" in numbers
    assert (tmp_path / "out/figures/commerce.svg").is_file() and (tmp_path / "out/figures/commerce_recall.svg").is_file()


def test_predictions_know_the_tier_of_a_signed_answer():
    from small import PAIRS  # torch with it

    from she_nb.task import render
    plain, signed = (prediction(PAIRS[0], chain, "wild") for chain in
                     (render(PAIRS[0].truth), with_level(render(PAIRS[0].truth), 2)))
    assert plain == signed and signed["step_5"] == 1


def test_the_arms_with_signs_differ_in_their_reward_alone():
    "Both begin with one first model of their own, made of the data that all arms share; no other run knows of them."
    runs = {run.key: run for run in plan(open_book("tiny", studies=True))}
    assert runs["sft-sft_valued-s0"].needs == ("data-all-s0",)
    ours, theirs = (runs[f"train-{arm}-s0"] for arm in ("srpo_valued", "srpo_unvalued"))
    assert ours.needs == theirs.needs == ("data-all-s0", "sft-sft_valued-s0")
    differing = {name for name in ours.parameters if ours.parameters[name] != theirs.parameters[name]}
    assert differing == {"arm", "reward"} and ours.parameters["reward"] == "valued"
    assert {run.stage for run in runs.values() if "sft-sft_valued-s0" in run.needs} == {"train", "evaluate", "report"}
