"The site as a reader meets it: built from the notebooks, and opened in a browser without a network."
import re
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT

TINY = ROOT / "reports/tiny"   # may be absent, or hold some of the runs
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    "Where the built site is served."
    pytest.importorskip("sphinx", reason="the site's tools are not installed")
    from she_nb.book.site import build
    first = build(ROOT, tmp_path_factory.mktemp("site"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(first.parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    if not BROWSER: pytest.skip("no browser: neither chromium nor google-chrome is installed, and apt-get could not")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play:
        one = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield one
        one.close()


@pytest.fixture
def visit(browser, address):
    "Open a page; afterwards nothing may have failed, and nothing may have left this machine."
    said, sizes = [], {"width": 1200, "height": 900}
    page = browser.new_page(viewport=sizes)
    page.on("console", lambda line: said.append(line.text) if line.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda asked: None if asked.url.startswith((address, "data:", "blob:")) else said.append(asked.url))
    page.on("response", lambda got: said.append(f"{got.status} {got.url}") if got.status >= 400 else None)

    def go(name, width=1200):
        page.set_viewport_size(sizes | {"width": width})
        page.goto(f"{address}/{name}.html", wait_until="load")
        return page

    yield go
    page.close()
    assert said == []


@pytest.fixture(scope="module")
def groups():
    "The recorded groups of the live picture; without any, the page has a sentence in its place."
    from she_nb.serving.live import recorded_groups
    return recorded_groups(TINY) or pytest.skip("no run has recorded a group yet")


def test_the_first_page(visit):
    page = visit("index")
    assert "make book" in page.inner_text("main") and "make test" in page.inner_text("main")
    assert page.evaluate("[...document.querySelectorAll('main img')].every(one => one.complete && one.naturalWidth > 100)")
    assert page.locator("div.cell_input").count() == 0   # no code
    assert page.locator("main img").count() >= 1 or not (TINY / "figures/arms.svg").is_file()


def test_a_sentence_stands_where_nothing_is_recorded(visit):
    page = visit("index")
    if page.locator(".live").count(): pytest.skip("a group is recorded")
    assert "no run has recorded one yet" in page.inner_text("main")


def settle(page):
    "Waits until no colour fades any more."
    page.evaluate("Promise.all(document.getAnimations().map(one => one.finished.catch(() => 0)))")


def shown(page):
    "Of every token of the live picture: its advantage, whether its background is blue, red or bare; of every field its number."
    return page.evaluate("""() => [...document.querySelectorAll(".live .answers [role=row]:not(.truth)")].map(row =>
      [...row.querySelectorAll(".step")].map(step => ({said: step.querySelector(".num").textContent,
        tokens: [...step.querySelectorAll(".t")].map(t => [Number(t.dataset.a), getComputedStyle(t).backgroundColor])})))""")


def expected(group, source, rule, gamma):
    "What the library gives to a recorded group; answers that say the same once."
    from she_nb.serving.live import prefix_counts, step_advantages, step_labels
    texts = ["".join(said["tokens"]) for said in group["responses"]]
    rows = [texts.index(text) for text in dict.fromkeys(texts)]
    made, divisors, found = step_advantages(step_labels(group), source, rule, gamma), prefix_counts(group), []
    for row in rows:
        said, by = group["responses"][row], divisors[row] if rule == "lambda_grpo" else [1] * 999
        found.append([[made[row, step].item() / by[k] for k, at in enumerate(said["step_ids"])
                       if at == step and said["tokens"][k].strip()] for step in range(5)])
    return found


@pytest.mark.parametrize("source, rule, gamma", [
    (0, "srpo_return", 1.0), (0, "grpo", 1.0), (0, "srpo_return", 0.5), (1, "srpo_step", 0.0), (2, "srpo_return", 1.0),
    (0, "lambda_grpo", 1.0), (1, "minimum", 1.0)])
def test_the_live_picture_shows_what_the_library_says(visit, groups, source, rule, gamma):
    from she_nb.serving.live import GAMMAS, PILLS, REWARD_SOURCES
    page = visit("index")
    if rule in PILLS: page.locator(f".live .pill input[value={rule}]").check(force=True)
    else: page.locator(".live .rest").select_option(rule)
    page.locator(".live .source").select_option(str(source))
    move = "(one, at) => { one.value = at; one.dispatchEvent(new Event('input')); }"
    page.locator(".live .gamma").evaluate(move, GAMMAS.index(gamma))
    settle(page)
    group = next(iter(groups.values()))
    found, told = shown(page), expected(group, list(REWARD_SOURCES)[source], rule, gamma)
    assert len(found) == len(told)
    for row, wanted in zip(found, told, strict=True):
        for step, values in zip(row, wanted, strict=True):
            assert [value for value, _ in step["tokens"]] == pytest.approx(values, abs=2e-3)
            said = float(re.findall(r"[\d.]+", step["said"])[-1])   # two decimals of what the page holds with three
            assert said == pytest.approx(abs(values[-1]), abs=6e-3) and ("+" in step["said"]) == (max(values) > 5e-3)
            for value, colour in step["tokens"]:
                if value: assert ("(0, 114, 178" if value > 0 else "(213, 94, 0") in colour
                else: assert float(colour.rpartition(",")[2].strip(" )")) < .01    # no colour, or the last of a fading one


def test_the_live_picture_changes(visit, groups):
    page = visit("index")
    first, sentence = shown(page), page.inner_text(".live .sum")
    page.locator(".live .pill input[value=grpo]").check(force=True)
    assert shown(page) != first and page.inner_text(".live .sum") != sentence and page.locator(".live .gamma").is_disabled()
    page.locator(".live .group").select_option("1")
    assert page.inner_text(".live .query") not in sentence and len(shown(page)) > 1


def test_the_live_picture_by_keyboard(visit, groups):
    page = visit("66_serving.explore")
    page.locator(".live .step[tabindex='0']").focus()
    first = page.inner_text(".live .detail")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    told = page.inner_text(".live .detail")
    assert first.startswith("Answer 1, query: ") and told.startswith("Answer 2, item: ") and "advantage" in told
    assert page.locator(".live .step[tabindex='0']").count() == 1
    unnamed = "one => !one.labels.length && !one.ariaLabel"
    assert page.evaluate(f"[...document.querySelectorAll('.live :is(select, input)')].filter({unnamed}).length") == 0


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_live_picture_can_be_read(visit, groups, theme):
    "Text on every colour has a contrast of at least 4.5."
    page = visit("index", width=390)
    page.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
    settle(page)
    ratios = page.evaluate("""() => {
      const parts = text => (text.match(/[0-9.]+/g) || []).map(Number);
      const light = rgb => rgb.map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
      const ground = parts(getComputedStyle(document.body).backgroundColor).slice(0, 3);
      return [...document.querySelectorAll(".live .t")].map(t => { const look = getComputedStyle(t);
        const [r, g, b, a = 1] = parts(look.backgroundColor), under = [r, g, b].map((v, i) => a * v + (1 - a) * ground[i]);
        const [x, y] = [light(parts(look.color).slice(0, 3)), light(under)].sort((p, q) => q - p);
        return (x + .05) / (y + .05); }); }""")
    assert len(ratios) > 50 and min(ratios) >= 4.5
    assert page.evaluate("document.documentElement.scrollWidth") <= 391


def test_a_study_begins_with_its_answer(visit):
    page = visit("ablations/credit")
    parts = ("h1", "blockquote", "p:has(strong)", "figure img", "h2:has-text('How it was run')", "details")
    found = [page.locator(f"article {part}") for part in parts if part != "figure img" or page.locator("article figure").count()]
    tops = [one.first.bounding_box()["y"] for one in found]   # a study without runs has no picture
    assert tops == sorted(tops)
    assert page.locator("main div.cell_input").filter(visible=True).count() == 0       # all code is folded


def test_a_stage_folds_its_plumbing(visit):
    page = visit("stages/train")
    seen = " ".join(page.locator("main div.cell_input").filter(visible=True).all_inner_texts())
    assert "launch(" in seen and "start_run(" not in seen and "import pandas" not in seen
    tops = [page.locator(f"article {what}").first.bounding_box()["y"] for what in ("h1", "img", "details")]
    assert tops == sorted(tops)


def test_the_parts_stand_in_order(visit):
    page = visit("index")
    captions = page.locator("nav p.caption").all_inner_texts()
    assert captions == ["Results", "The task", "The shop", "The policy", "Learning", "Evidence", "Serving", "The book",
                        "Studies, as run", "Stages, as run", "About"]


def test_the_house_stands():
    from she_nb.book.house import chapter_modules, imports_of, module_lines, upward
    order, imports = chapter_modules(sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))), imports_of(ROOT / "she_nb")
    assert sum(map(len, imports.values())) > 50 and upward(order, imports) == []
    done = set()                                       # no circle: what is left can always begin with somebody
    while ready := [name for name in imports if name not in done and set(imports[name]) <= done]: done |= set(ready)
    assert done == set(imports)
    assert {name: count for name, count in module_lines(ROOT / "she_nb").items() if count > 500} == {}


def test_from_page_to_page(visit):
    page = visit("index")
    page.locator("nav a", has_text="Advantages").first.click()
    page.wait_for_url("**/30_learning.advantage.html")
    assert page.inner_text("h1").startswith("Advantages")
    assert page.locator("div.cell_input").count() > 10 and page.locator("div.cell_output").count() > 5
    assert "she_nb.learning.advantage" in page.inner_text("#reference-she-nb-learning-advantage h2")


def test_a_formula_is_drawn(visit):
    box = visit("30_learning.advantage").locator("math").first.bounding_box()
    assert box["width"] > 4 and box["height"] > 8


def test_search_finds_a_page(visit):
    page = visit("search")
    page.goto(page.url + "?q=entropy")
    page.wait_for_selector("#search-results li", timeout=20_000)
    assert page.locator("#search-results li").count() > 2


@pytest.mark.parametrize("name", ["index", "30_learning.advantage", "claims", "report", "66_serving.explore", "house",
                                  "ablations/gamma", "stages/train"])
def test_on_a_phone(visit, name):
    page = visit(name, width=390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 391


def test_dark_is_dark(visit):
    page = visit("index")
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, background.removeprefix("rgb(").removesuffix(")").split(","))) < 90


def test_claims_can_be_sorted(visit):
    page = visit("claims")
    if not page.locator("main table").count(): pytest.skip("no claim has two seeds yet")
    numbers = "[...document.querySelectorAll('main table tbody tr')].map(row => parseFloat(row.cells[4].textContent))"
    for turned in (False, True):
        page.locator("main thead th").nth(4).click()
        found = page.evaluate(numbers)
        known = [number for number in found if number == number]  # a claim without this number stands last, either way
        assert found[:len(known)] == sorted(known, reverse=turned)


def test_the_explorer_shows_a_group(visit):
    page = visit("66_serving.explore")
    assert page.locator("main ol li span[title]").count() > 10
