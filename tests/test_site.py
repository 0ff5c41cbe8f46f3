"The site as a reader meets it: built from the notebooks, and opened in a browser without a network."
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT

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


def test_the_first_page(visit):
    page = visit("index")
    assert "make book" in page.inner_text("main") and "make test" in page.inner_text("main")
    assert page.evaluate("[...document.querySelectorAll('main img')].every(one => one.complete && one.naturalWidth > 100)")
    assert page.locator("main img").count() >= 1 and page.locator("div.cell_input").count() == 0   # pictures, and no code


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


@pytest.mark.parametrize("name", ["index", "30_learning.advantage", "claims", "report", "66_serving.explore"])
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
    numbers = "[...document.querySelectorAll('main table tbody tr')].map(row => parseFloat(row.cells[4].textContent))"
    for turned in (False, True):
        page.locator("main thead th").nth(4).click()
        found = page.evaluate(numbers)
        known = [number for number in found if number == number]  # a claim without this number stands last, either way
        assert len(known) > 2 and found[:len(known)] == sorted(known, reverse=turned)


def test_the_explorer_shows_a_group(visit):
    page = visit("66_serving.explore")
    assert page.locator("main ol li span[title]").count() > 10
