"""The reproduction's report in a real browser: headless Chromium opens, sorts and prints it."""

import base64
import json
import shutil

import pytest

from tests.scenes import HANGS

pytestmark = pytest.mark.browser
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
WIDTHS = (400, 1600)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no Chromium: chromium or chromedriver is not on the PATH")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(HANGS)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def report(reproduced):
    return reproduced.out


@pytest.fixture(params=WIDTHS)
def page(browser, report, request):
    size = {"width": request.param, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get((report / "report.html").as_uri())
    return browser


def test_it_opens_without_a_complaint(page):
    assert page.title.startswith("The modality gap")
    assert page.get_log("browser") == []


def test_every_image_is_drawn(page, report):
    sizes = page.execute_script(
        "return [...document.images].map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width, i.alt])"
    )
    figures = [f for e in json.loads((report / "report.json").read_text())["targets"].values() for f in e["figures"]]
    assert len(sizes) == len(figures) >= 4
    for complete, natural, shown, words in sizes:
        assert complete
        assert natural > 0
        assert shown >= min(300, natural / 2)
        assert words


def test_nothing_is_wider_than_the_screen(page):
    script = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    wide, screen = page.execute_script(script)
    assert wide <= screen
    page.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    wide, screen = page.execute_script(script)
    assert wide <= screen, "with everything unfolded"


def test_text_is_large_enough_to_read(page):
    smallest = page.execute_script(
        "return Math.min(...[...document.querySelectorAll('p, td, figcaption, dd, button')]"
        ".map(e => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert smallest >= 12


def _column(page, number):
    return page.execute_script(
        "return [...document.querySelector('table.sortable').tBodies[0].rows]"
        ".map(r => r.cells[arguments[0]].dataset.sort)",
        number,
    )


def _click(page, number):
    from selenium.webdriver.common.by import By

    button = page.find_elements(By.CSS_SELECTOR, "table.sortable thead button")[number]
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()
    return page.find_elements(By.CSS_SELECTOR, "table.sortable thead th")[number].get_attribute("aria-sort")


def test_a_click_sorts_and_another_turns_it_round(page):
    before = _column(page, 3)
    assert _click(page, 3) == "ascending"
    up = _column(page, 3)
    values = [float(v) for v in up if v]
    assert values == sorted(float(v) for v in before if v)
    assert all(up[: len(values)]), "what has no number stays below"
    assert "" in up
    assert _click(page, 3) == "descending"
    down = [v for v in _column(page, 3) if v]
    assert list(map(float, down)) == values[::-1]
    assert _click(page, 4) == "ascending"
    assert _column(page, 4) == sorted(_column(page, 4))
    assert _click(page, 0) == "ascending"
    assert _column(page, 0) == [str(i) for i in range(len(before))], "back in the paper's order"
    assert page.get_log("browser") == []


def test_links_lead_somewhere(page):
    missing = page.execute_script(
        "return [...document.querySelectorAll('a')].filter(a => !document.querySelector("
        "'#' + CSS.escape(a.getAttribute('href').slice(1)))).map(a => a.href)"
    )
    assert missing == []


def test_it_prints(page):
    done = page.execute_cdp_cmd("Page.printToPDF", {"printBackground": True, "paperWidth": 8.27, "paperHeight": 11.69})
    document = base64.b64decode(done["data"])
    assert document[:4] == b"%PDF"
    assert len(document) > 50_000
