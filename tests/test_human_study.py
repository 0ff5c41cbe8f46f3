"People as raters: a study survives kills, is answered by keys alone, and its analysis finds the habits that are there."
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from conftest import ROOT

from she_nb.evidence.people import (
    CANT_TELL,
    Design,
    cases_of,
    plan,
    read_answers,
    read_events,
    read_key,
    study_tables,
    write_plan,
)
from she_nb.evidence.raters import findings
from she_nb.evidence.simulated import Habits, invented_cases, simulate
from she_nb.serving.rater import DONE, Rater, export_sheet, import_sheet, two_models

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
RATERS = ("ann", "bo", "cy")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "A planned study: its folder, sheet and key."
    folder = tmp_path_factory.mktemp("study")
    sheet, key = plan(invented_cases(80), Design(("one", "two"), RATERS, compared=10, rated=8, again=2), "Read both.")
    write_plan(sheet, key, folder)
    return folder, sheet, read_key(folder, sheet)


@pytest.fixture(scope="module")
def said(study):
    "What simulated raters answer."
    return simulate(*study_tables(*study[1:], {}), dict.fromkeys(RATERS, Habits(follows_wrong=.5)), seed=1)


def keys_of(row, kind):
    "The keys that give the answers of a row."
    if kind == "rate": return [str(int(row.before)), str(int(row.after))]
    left, right = ("1", "2") if row["first"] else ("2", "1")
    better = {1: "1", 0: "2", -1: "3"}[int(row.preference if row["first"] else -row.preference)]
    trust = [str(int(row[f"trust_{side}"])) for side in (left, right)]
    marks = [[*map(str, row[f"marks_{side}"]), DONE] for side in (left, right)]
    return [better, *trust, *marks[0], *marks[1]]


def pressed(said, name):
    "All keys of one rater, trial by trial."
    rows = {row["trial"]: (row, kind) for table, kind in zip(said, ("compare", "rate"), strict=True)
            for _, row in table[table.rater == name].iterrows()}
    return [key for trial in sorted(rows) for key in keys_of(*rows[trial])]


def same(found, wanted, columns):
    pd.testing.assert_frame_equal(found[columns].reset_index(drop=True), wanted[columns].reset_index(drop=True))


def test_raters_at_the_keys_say_what_they_mean(study, said):
    folder, sheet, key = study
    for name in RATERS:
        rater = Rater(folder, name)
        for press in pressed(said, name): rater.press(press)
        assert rater.now() is None and Rater(folder, name).now() is None
    compare, rate = study_tables(sheet, key, read_answers(folder, sheet))
    same(compare, said[0], ["rater", "trial", "preference", "trust_1", "trust_2", "marks_1", "marks_2"])
    same(rate, said[1], ["rater", "trial", "before", "after"])
    rows = read_events(folder / "answers/ann.jsonl")
    assert {row["guidelines"] for row in rows} == {sheet["guidelines"]["version"]}
    assert {row["sheet"] for row in rows} == {Rater(folder, "ann").digest}


def test_no_rater_is_shown_what_is_sealed(study):
    folder, sheet, key = study
    shown = json.dumps(sheet["raters"])
    assert not any(f'"{word}"' in shown for word in ("one", "two", "case", "first", "true", "right_steps", "seed", "control"))
    assert {tuple(trial) for trials in sheet["raters"].values() for trial in trials} == {
        ("trial", "kind", "query", "item", "left", "right"), ("trial", "kind", "query", "item", "steps")}
    lefts = [sum(place["first"] for place in key["trials"][name].values() if not place["again"]) for name in RATERS]
    assert lefts == [9, 9, 9]                                # of eighteen: nobody sees a model on one side


@pytest.mark.parametrize("kills", [6])
def test_killed_again_and_again_no_click_is_lost_or_doubled(said, study, tmp_path, kills):
    shutil.copytree(study[0], tmp_path / "study", ignore=shutil.ignore_patterns("answers"))
    rng, wanted = random.Random(kills), pressed(said, "bo")

    def sit():
        rater = Rater(tmp_path / "study", "bo")
        for press in wanted[len(rater.events):]:
            rater.press(press)
            time.sleep(.001)

    for _ in range(kills):
        if not (child := os.fork()):
            sit()
            os._exit(0)
        time.sleep(rng.uniform(.01, .06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with (path := tmp_path / "study/answers/bo.jsonl").open("ab") as file: file.write(b'{"torn": ')
    left = len(wanted) - len(read_events(path))
    sit()
    assert len(read_events(path)) == len(wanted)
    assert not left or path.read_bytes().endswith(b"}\n")     # the next click cuts a torn row off; until then none reads it
    answers = read_answers(tmp_path / "study", study[1])
    compare, _ = study_tables(*study[1:], answers)
    same(compare[compare.rater == "bo"], said[0][said[0].rater == "bo"], ["trial", "preference", "marks_1"])


def test_a_spreadsheet_says_the_same_as_the_page(said, study, tmp_path):
    folder = tmp_path / "study"
    shutil.copytree(study[0], folder, ignore=shutil.ignore_patterns("answers"))
    page = Rater(folder, "cy")
    for press in pressed(said, "cy"): page.press(press)
    sheets = {part: pd.read_csv(export_sheet(page, part, tmp_path / f"{part}.csv"), dtype=str) for part in
              ("before", "after", "compare")}
    page.path.unlink()
    for part, table in sheets.items():
        table.to_csv(tmp_path / f"{part}.csv", index=False, sep=";")          # as a European spreadsheet saves it
        import_sheet(Rater(folder, "cy"), tmp_path / f"{part}.csv")
    again = Rater(folder, "cy")
    compare, rate = study_tables(*study[1:], read_answers(folder, study[1]))
    assert again.now() is None
    same(compare[compare.rater == "cy"], said[0][said[0].rater == "cy"], ["trial", "preference", "trust_1", "marks_2"])
    same(rate[rate.rater == "cy"], said[1][said[1].rater == "cy"], ["trial", "before", "after"])


def test_what_nobody_can_tell_is_no_answer(study, tmp_path):
    shutil.copytree(study[0], tmp_path / "study", ignore=shutil.ignore_patterns("answers"))
    rater = Rater(tmp_path / "study", "ann")
    while rater.now(): rater.press("0")
    assert {row["value"] for row in rater.events} == {CANT_TELL}
    found = findings(*study_tables(*study[1:], read_answers(tmp_path / "study", study[1])))
    assert found.loc["GSB", "answers"] == 0 and found.loc["could not tell", "value"] == 1


def judged_file(path, tiers):
    "Rows as `she-nb judge` writes them."
    rows = [{"query": f"red boots {i}", "doc_id": f"A-{i}", "title": f"Boots {i}", "tier": tier, "rating": str(tier),
             "status": "ok", "asked": "boots ; color red", "item": "boots ; color red", "category": "boots boots same",
             "attributes": f"color red red {'match' if tier == 4 else 'unknown'}"} for i, tier in enumerate(tiers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_two_files_of_judgments_become_a_study(tmp_path):
    files = [judged_file(tmp_path / f"{name}.jsonl", tiers) for name, tiers in (("a", [4, 3] * 20), ("b", [4, 4] * 20))]
    lines = ["query,docid,rating", *(f"red boots {i},A-{i},{4 - i % 2}" for i in range(40))]
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    first, second = two_models(("a", "b"), judged=",".join(map(str, files)), labels=str(tmp_path / "labels.csv"), scale="tiers")
    cases = cases_of(first, second)
    assert (len(cases), sum(case.alike for case in cases), {case.true for case in cases}) == (40, 20, {3, 4})
    sheet, key = plan(cases, Design(("a", "b"), ("ann",), compared=10, rated=10, again=0), "")
    assert (key["counts"]["alike"], len(sheet["raters"]["ann"])) == (20, 20)


def test_the_notebook_runs_with_simulated_raters(tmp_path):
    given = {"out": tmp_path / "study", "compared": 12, "rated": 8, "raters": "ann,bo"}
    words = [word for name, value in given.items() for word in ("-p", name, value)]
    command = [sys.executable, "-m", "papermill", ROOT / "nbs/human_study.ipynb", tmp_path / "run.ipynb", *words]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    page = (tmp_path / "study/study.html").read_text()
    assert "The raters are simulated" in page and "GSB" in page and "steady" in page
    assert not (tmp_path / "study/answers").exists()       # simulated answers are nobody's
    assert {"sheet.json", "sealed", "study.html", "findings.csv"} <= {path.name for path in (tmp_path / "study").iterdir()}


STUB = """<!doctype html><meta name="viewport" content="width=device-width"><style>CSS</style><div id="here"></div>
<script type="module">JS
const sent = window.sent = [], told = {};
const model = { get: name => told[name], on: (_, draw) => window.draw = draw, send: word => sent.push(word) };
window.tell = page => { told.page = page; told.count = (told.count || 0) + 1; window.draw && window.draw(); };
window.tell(PAGE);
render({ model, el: document.getElementById("here") });
</script>"""


@pytest.mark.parametrize("width", [1200, 390])
def test_the_page_in_a_browser(study, said, tmp_path, width):
    "Keys and clicks reach Python as one message each, and nothing is wider than a phone."
    if not BROWSER: pytest.skip("no browser")
    from playwright.sync_api import sync_playwright

    from she_nb.serving.study import STUDY_CSS, STUDY_JS, study_html
    shutil.copytree(study[0], tmp_path / "study", ignore=shutil.ignore_patterns("answers"))
    rater = Rater(tmp_path / "study", "ann")
    script = STUDY_JS.replace("export default { render };", "")
    content = STUB.replace("CSS", STUDY_CSS, 1).replace("JS", script, 1).replace("PAGE", json.dumps(study_html(rater)), 1)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 844})
        page.set_content(content)
        page.wait_for_function("document.activeElement.id === 'here'")
        sent = 0
        for wanted in pressed(said, "ann"):
            if sent % 2: page.locator(f".she-study .ask [data-key='{wanted}']").click()
            else: page.keyboard.press(wanted)
            page.keyboard.press("Control+3")               # the browser's own
            page.keyboard.press("z")                       # answers nothing
            assert page.evaluate("[sent.length, sent.at(-1).key]") == [sent := sent + 1, wanted]
            rater.press(page.evaluate("sent.at(-1).key"))
            page.evaluate("page => tell(page)", study_html(rater))
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate("document.activeElement.id") == "here"
        assert "All done" in page.inner_text(".she-study")
        browser.close()
    assert rater.now() is None and len(rater.events) == sent
