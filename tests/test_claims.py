"""The claims of a report, computed again from its predictions in other code: plain loops and scikit-learn."""
import json
import random
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student
from sklearn.metrics import f1_score

ROOT = Path(__file__).resolve().parent.parent
ARMS = {"sft": (.8, .7), "dpo": (.85, .75), "grpo": (.9, .75), "srpo": (.92, .88)}  # how often steps and tier are right
SEEDS, PAIRS = (0, 1, 2), 120
COLUMNS = ["set", "id", "tier_true", "tier_pred", *(f"step_{k}" for k in range(1, 6))]


def invented(steps, tier, pairs, rng):
    "Predictions of one arm on given pairs, in an order of its own; some truths of step 4 are unknown."
    table = pairs.copy()
    for k in (1, 2, 3, 4): table[f"step_{k}"] = (rng.random(len(table)) < steps).astype(float)
    table.loc[table["candidate"] == "random", "step_4"] = np.nan
    right = rng.random(len(table)) < tier
    table["tier_pred"] = np.where(right, table["tier_true"], rng.integers(0, 5, len(table)))
    table["step_5"] = (table["tier_pred"] == table["tier_true"]).astype(float)
    table["well_formed"] = (table["tier_pred"] > 0).astype(int)
    for k in (3, 4): table[f"lenient_{k}"] = table[f"follows_{k}"] = table[f"step_{k}"]
    return table.sample(frac=1, random_state=int(rng.integers(10**6)))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    "A report of three seeds, each with pairs of its own, and the claims that the book draws from it."
    from she_nb.evidence.evaluate import evaluate_claims, read_records
    from she_nb.evidence.metrics import metrics
    folder, rng = tmp_path_factory.mktemp("report"), np.random.default_rng(0)
    for seed in SEEDS:
        size = 2 * PAIRS
        pairs = pd.DataFrame({"set": ["wild", "balanced"] * PAIRS, "id": [f"{seed}-{i:03}" for i in range(size)],
                              "query_type": rng.choice(["plain", "negation"], size), "wishes": rng.integers(1, 6, size),
                              "candidate": rng.choice(["seed", "random"], size), "tier_true": rng.integers(1, 5, size)})
        for arm, chances in ARMS.items():
            run, table = folder / f"runs/evaluate-{arm}-s{seed}", invented(*chances, pairs, rng)
            run.mkdir(parents=True)
            table.to_csv(run / "predictions.csv.gz", index=False)
            (run / "run.json").write_text(json.dumps({"stage": "evaluate", "arm": arm, "seed": seed, "metrics": metrics(table)}))
    evaluate_claims(read_records(folder)).to_csv(folder / "claims.csv", index=False)
    return folder


def rows_of(folder, arm, seed, test=None):
    "The rows of one test set by pair; of both, where none is named, by test and pair."
    table = pd.read_csv(folder / f"runs/evaluate-{arm}-s{seed}/predictions.csv.gz", usecols=COLUMNS)
    rows = {name: {} for name in table["set"].unique()}
    for row in table.to_dict("records"): rows[row["set"]][row["id"]] = row
    return rows[test] if test else rows


def seeds_of(folder, *arms):
    found = [{int(path.name.rpartition("-s")[2]) for path in folder.glob(f"runs/evaluate-{arm}-s*")} for arm in arms]
    return sorted(set.intersection(*found))


def all_right(row):
    "1 where every step that has a truth is right, 0 where one is not, None where none has."
    known = [row[f"step_{k}"] for k in range(1, 6) if row[f"step_{k}"] == row[f"step_{k}"]]
    return float(all(known)) if known else None


def measured(rows, name):
    if name == "all_steps":
        values = [value for row in rows if (value := all_right(row)) is not None]
        return sum(values) / len(values)
    true, given = [row["tier_true"] for row in rows], [row["tier_pred"] for row in rows]
    return f1_score(true, given, labels=sorted(set(true)), average="macro", zero_division=0)


def claims_of(folder): return pd.read_csv(folder / "claims.csv").to_dict("records")


def check_effects(folder):
    claims = claims_of(folder)
    @cache
    def numbers(arm, seed):
        return {f"{test}/{name}": measured(list(rows.values()), name) for test, rows in rows_of(folder, arm, seed).items()
                for name in ("all_steps", "macro_f1")}

    for claim in claims:
        (arm, rival), metric = claim["arms"].split(","), claim["metric"]
        seeds = seeds_of(folder, arm, rival)
        differences = [numbers(arm, seed)[metric] - numbers(rival, seed)[metric] for seed in seeds]
        assert claim["seeds"] == len(seeds), claim
        assert claim["effect"] == pytest.approx(sum(differences) / len(seeds), abs=1e-9), claim
    return claims


def check_verdicts(claims):
    "p-values belong to the intervals, and Holm's are those of the paper's rows, from the smallest on."
    for claim in claims:
        if claim["seeds"] < 2:
            assert claim["verdict"] == "undecided" and np.isnan(claim["p"])
            continue
        half = (claim["ci_high"] - claim["ci_low"]) / 2
        error = half / student.ppf(.975, claim["seeds"] - 1)
        if error: assert claim["p"] == pytest.approx(2 * student.sf(abs(claim["effect"]) / error, claim["seeds"] - 1), abs=1e-9)
        expected = "holds" if claim["ci_low"] > 0 else "fails" if claim["ci_high"] < 0 else "undecided"
        assert claim["verdict"] == expected
    family, least = sorted((c for c in claims if c["source"] == "paper" and c["seeds"] > 1), key=lambda c: c["p"]), 0.
    for place, claim in enumerate(family):
        least = max(least, min(1, claim["p"] * (len(family) - place)))
        assert claim["p_holm"] == pytest.approx(least, abs=1e-12)
        outcome = ("holds" if claim["effect"] > 0 else "fails") if least < .05 else "undecided"
        assert claim["verdict_holm"] == outcome
    assert all(np.isnan(c["p_holm"]) for c in claims if c["source"] != "paper")


def quick_f1(cells):
    "Macro F1 of (true, given) pairs, for thousands of resamples; it is scikit-learn's."
    true, given, right = {}, {}, {}
    for t, g in cells:
        true[t], given[g] = true.get(t, 0) + 1, given.get(g, 0) + 1
        if t == g: right[t] = right.get(t, 0) + 1
    return sum(2 * right.get(t, 0) / (n + given.get(t, 0)) for t, n in true.items()) / len(true)


def resampled_error(folder, arm, rival, test, name, draws, rng):
    "Standard deviation of the mean difference when seeds, and pairs within them, are drawn again."
    def facts(row): return all_right(row) if name == "all_steps" else (row["tier_true"], row["tier_pred"])
    def value(kept): return sum(kept) / len(kept) if name == "all_steps" else quick_f1(kept)
    seeds, books = seeds_of(folder, arm, rival), []
    for seed in seeds:
        ours, theirs = (rows_of(folder, who, seed, test) for who in (arm, rival))
        books.append([(facts(ours[pair]), facts(theirs[pair])) for pair in ours])
    means = []
    for _ in range(draws):
        differences = []
        for _ in seeds:
            book = rng.choice(books)
            drawn = [rng.choice(book) for _ in book]
            differences.append(value([a for a, _ in drawn]) - value([b for _, b in drawn]))
        means.append(sum(differences) / len(differences))
    return float(np.std(means))


def test_effects_and_verdicts_come_from_the_predictions(report):
    claims = check_effects(report)
    assert len(claims) == 4 * 5  # SRPO against three arms, GRPO against DPO, DPO against SFT; four metrics
    check_verdicts(claims)
    assert {"holds", "undecided"} <= {claim["verdict"] for claim in claims}


def test_quick_f1_is_the_usual_one():
    rng = random.Random(1)
    cells = [(rng.randint(1, 4), rng.randint(0, 4)) for _ in range(200)]
    true, given = zip(*cells, strict=True)
    assert quick_f1(cells) == pytest.approx(f1_score(true, given, labels=[1, 2, 3, 4], average="macro"))


def test_intervals_count_seeds_and_pairs(report):
    """A standard deviation of n draws is off by a share of 1/sqrt(2n): 2.2 % for the book's 1,000, 4.1 % for the 300 here.
    Together 4.7 %; four times that is allowed, of half the interval's width."""
    rng, factor = random.Random(7), np.sqrt(3 / 2) * student.ppf(.975, 2)
    for claim in claims_of(report):
        half = factor * resampled_error(report, *claim["arms"].split(","), *claim["metric"].split("/"), 300, rng)
        for end, sign in (("ci_low", -1), ("ci_high", 1)):
            assert claim[end] == pytest.approx(claim["effect"] + sign * half, abs=.19 * half), claim


def test_committed_claims_are_those_of_their_predictions():
    for path in sorted(ROOT.glob("reports/*/claims.csv")):
        predictions = next(path.parent.glob("runs/evaluate-*/predictions.csv.gz"), None)
        if predictions is None or "wishes" not in pd.read_csv(predictions, nrows=1): continue
        check_verdicts(check_effects(path.parent))
