"""The gallery in a real browser: Debian's chromium and chromium-driver, driven by selenium, headless."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import view_captions
from captioning.data.prepared import Record
from captioning.report.comparison import compare_models
from captioning.report.gallery import ShownCaption, ShownModel, write_gallery
from captioning.report.quality import attention_summary, caption_quality
from metrics import score_captions

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="needs Debian's chromium and chromium-driver",
    ),
]

ATTACK = "<img src=x onerror=alert(1)> </script><script>alert(2)</script>"
STRANGE_ID = "a\"b'c<d>&amp;"


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1300,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


def make_gallery(folder: Path, count: int) -> Path:
    """Two models with attention; model b is wrong on every second image."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    paths = []
    for number, colour in enumerate(("red", "green", "blue")):
        paths.append(str(folder / f"{number}.png"))
        Image.new("RGB", (320, 240), colour).save(paths[-1])
    texts = [f"a dog number {n} runs on the green grass" for n in range(count)]
    records = [
        Record(f"image {n}", paths[n % 3], [text, f"the dog {n} is running"]) for n, text in enumerate(texts)
    ]
    texts[1], records[1].image_id, records[2].path = ATTACK, STRANGE_ID, None
    models = []
    for name, grid in (("a", 14), ("b", 8)):
        captions = {}
        for n, record in enumerate(records):
            words = texts[n].split() if name == "a" or n % 2 else ["a", "cat"]
            maps = rng.random((len(words), grid, grid), dtype=np.float32) ** 4
            maps /= maps.sum(axis=(1, 2), keepdims=True)
            log_probs = (-rng.random(len(words))).tolist()
            captions[record.image_id] = ShownCaption(" ".join(words), words, sum(log_probs), log_probs, maps)
        models.append(ShownModel(name, captions))
    references = {record.image_id: record.captions for record in records}
    own = [{key: caption.text for key, caption in model.captions.items()} for model in models]
    for model, captions in zip(models, own):
        model.scores = score_captions(references, captions)
        words = {key: text.split() for key, text in captions.items()}
        model.quality = caption_quality(words, {key: [t.split() for t in r] for key, r in references.items()})
        shown = list(model.captions.values())
        model.quality["attention"] = attention_summary([c.words for c in shown], [c.attention for c in shown])
    pair = compare_models(references, own, [model.scores for model in models])
    pair |= {"first": 0, "second": 1, "images": count, "verdict": "a is better than b"}
    index, problems = write_gallery(folder / "gallery", records, models, [pair], "a test")
    assert len(problems) == 1
    return index


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    return make_gallery(tmp_path_factory.mktemp("pages") / "small", 12)


@pytest.fixture
def page(browser, gallery):
    browser.get(gallery.as_uri())
    wait(browser, "return document.querySelectorAll('.card .words').length > 4")
    yield browser
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]


def wait(browser, script: str, seconds: float = 5.0):
    """The value of a script as soon as it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = browser.execute_script(script)
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s: {script}")


def find(browser, selector: str) -> list:
    return browser.find_elements("css selector", selector)


def hover(browser, element) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(browser).move_to_element(element).perform()


OVERLAY = """
const canvas = document.querySelector('.card .frame canvas');
if (!canvas) return null;
const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
return pixels.reduce((sum, value, i) => (sum * 31 + value) % 1000003, 7);
"""


def test_hovering_a_word_lays_its_attention_over_the_image(page):
    words = find(page, ".card[data-i='0'] .caption[data-model='0'] button.w")
    assert find(page, ".card canvas") == []
    seen = set()
    for word in words[:4]:
        hover(page, word)
        time.sleep(0.4)
        seen.add(page.execute_script(OVERLAY))
    assert len(seen) == 4 and None not in seen
    assert find(page, ".readout")[0].text.startswith(words[3].text)
    hover(page, find(page, "h1")[0])
    wait(page, "return !document.querySelector('.card canvas')")


def test_the_brightest_place_is_the_attention_s_maximum(browser, tmp_path):
    Image.new("RGB", (100, 100), "white").save(tmp_path / "a.png")
    maps = np.zeros((1, 14, 14), dtype=np.float32)
    maps[0, 3, 11] = 1
    model = ShownModel("a", {"x": ShownCaption("dog", ["dog"], -0.1, [-0.1], maps)})
    more = [Record("x", str(tmp_path / "a.png")), Record("y", str(tmp_path / "a.png"))]
    model.captions["y"] = ShownCaption("dog", ["dog"])
    index, _ = write_gallery(tmp_path / "gallery", more, [model])
    browser.get(index.as_uri())
    hover(browser, wait(browser, "return document.querySelector('.card[data-i=\"0\"] button.w')"))
    time.sleep(0.4)
    clearest = browser.execute_script(
        "const context = document.querySelector('.card canvas').getContext('2d');"
        "const p = context.getImageData(0, 0, 96, 96).data;"
        "let best = 0; for (let i = 0; i < 96 * 96; i++) if (p[4 * i + 3] < p[4 * best + 3]) best = i;"
        "return [Math.floor(best / 96), best % 96]"
    )
    assert clearest == [pytest.approx(3.5 * 96 / 14, abs=2), pytest.approx(11.5 * 96 / 14, abs=2)]


def test_both_kinds_of_model_on_the_demonstration(browser, prepared, models, blip_folder, tmp_path):
    view_captions.main(
        view_captions.Settings(
            checkpoint=(str(models),), model_path=(str(blip_folder),), data_folder=str(prepared),
            beam_size=1, output_folder=str(tmp_path / "g"),
        )
    )  # fmt: skip
    browser.get((tmp_path / "g" / "index.html").as_uri())
    wait(browser, "return document.querySelectorAll('.card[data-i=\"0\"] button.w').length > 2")
    for model in (0, 1):
        seen = set()
        for word in find(browser, f".card[data-i='0'] .caption[data-model='{model}'] button.w")[:2]:
            hover(browser, word)
            time.sleep(0.4)
            seen.add(browser.execute_script(OVERLAY))
        assert seen and None not in seen
    for tab in ("comparison", "quality"):
        find(browser, f"#tab-{tab}")[0].click()
        assert find(browser, f"#{tab} table")
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]


def test_tabbing_and_arrows_move_from_word_to_word(page):
    from selenium.webdriver import Keys

    words = find(page, ".card[data-i='0'] .caption[data-model='0'] button.w")
    page.execute_script("arguments[0].focus()", words[0])
    words[0].send_keys(Keys.TAB)
    assert page.switch_to.active_element == words[1]
    words[1].send_keys(Keys.ARROW_RIGHT)
    assert page.switch_to.active_element == words[2] and "on" in words[2].get_attribute("class").split()
    wait(page, "return document.querySelector('.card canvas')")


def test_play_walks_through_the_words(page):
    find(page, ".card[data-i='0'] .play")[0].click()
    seen = set()
    for _ in range(30):
        seen |= {word.get_attribute("data-k") for word in find(page, ".card[data-i='0'] .w.on")}
        time.sleep(0.1)
    assert len(seen) >= 3


def order(page) -> list[str]:
    return page.execute_script("return [...document.querySelectorAll('.card')].map((card) => card.dataset.i)")


def test_sorting(page):
    from selenium.webdriver.support.ui import Select

    assert order(page) == [str(n) for n in range(12)]
    Select(find(page, "#sort")[0]).select_by_value("CIDEr")
    Select(find(page, "#model")[0]).select_by_value("1")
    shown = page.execute_script(
        "const k = scores.findIndex(([name]) => name === 'CIDEr');"
        "return view.order.map((i) => images[i].captions[1].scores[k])"
    )
    assert shown == sorted(shown) and shown[0] < shown[-1]
    worst = order(page)
    find(page, "#direction")[0].click()
    assert order(page) != worst and int(order(page)[0]) % 2 == 1
    Select(find(page, "#sort")[0]).select_by_value("difference")
    assert all(int(i) % 2 == 0 for i in order(page)[:6])
    Select(find(page, "#sort")[0]).select_by_value("logprob")
    assert sorted(order(page), key=int) == [str(n) for n in range(12)] != order(page)


def test_searching(page):
    find(page, "#search")[0].send_keys("7 dog")
    wait(page, "return document.querySelectorAll('.card').length === 1")
    assert order(page) == ["7"] and find(page, "#count")[0].text == "1 of 12 images"
    wait(page, "return document.querySelector('.w.hit')")
    find(page, "#search")[0].send_keys(" nothing")
    wait(page, "return !document.querySelector('#none').hidden")
    find(page, "#search")[0].clear()
    find(page, "#search")[0].send_keys(" ")
    wait(page, "return document.querySelectorAll('.card').length === 12")


def test_captions_and_ids_are_text_and_nothing_of_them_runs(page):
    from selenium.common.exceptions import NoAlertPresentException

    text = page.execute_script(
        "return document.querySelector('.card[data-i=\"1\"] .words').textContent.trim()"
    )
    assert text == ATTACK
    assert find(page, ".card[data-i='1'] .id")[0].text == STRANGE_ID
    assert page.execute_script("return document.querySelectorAll('img[src=x], .card script').length") == 0
    with pytest.raises(NoAlertPresentException):
        page.switch_to.alert.accept()
    assert find(page, ".card[data-i='2'] .missing")[0].text == "no image file"


def test_the_large_view(page):
    find(page, ".card[data-i='0'] .frame")[0].click()
    wait(page, "return document.querySelector('#large').open")
    assert len(find(page, "#large .tile canvas")) == 9 + 2
    find(page, "#large .next")[0].click()
    assert find(page, "#large .id")[0].text == STRANGE_ID
    find(page, "#large .close")[0].click()
    assert not page.execute_script("return document.querySelector('#large').open")


def test_the_pages_of_numbers(page):
    find(page, "#tab-comparison")[0].click()
    text = find(page, "#comparison")[0].text
    assert "a is better than b" in text and "a better on 6" in text and "equal on 6" in text
    assert len(find(page, "#comparison .differ button")) == 12
    find(page, "#tab-quality")[0].click()
    assert "vocabulary used" in find(page, "#quality")[0].text
    assert len(find(page, "#quality svg")) >= 6 and len(find(page, "#quality canvas")) == 8


def test_light_and_dark(page):
    ground = "return getComputedStyle(document.body).backgroundColor"
    before = page.execute_script(ground)
    find(page, "#theme")[0].click()
    assert page.execute_script(ground) != before
    find(page, "#theme")[0].click()
    assert page.execute_script(ground) == before


def test_nothing_is_loaded_from_elsewhere(page):
    messages = [json.loads(line["message"])["message"] for line in page.get_log("performance")]
    loaded = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert any(name.endswith("data.js") for name in loaded)
    assert all(name.startswith(("file://", "data:")) for name in loaded)


LARGEST_PAINT = """
const done = arguments[0];
new PerformanceObserver((list) => done(list.getEntries().at(-1).startTime))
  .observe({ type: 'largest-contentful-paint', buffered: true });
"""
SCROLL = """
const [frames, done] = arguments;
let n = 0;
(function frame() {
  scrollBy(0, 60);
  if (++n < frames) requestAnimationFrame(frame);
  else done();
})();
"""


@pytest.mark.slow
def test_five_thousand_images(browser, tmp_path_factory):
    began = time.monotonic()
    index = make_gallery(tmp_path_factory.mktemp("pages") / "large", 5000)
    assert time.monotonic() - began < 60
    folder = index.parent
    size = sum(file.stat().st_size for file in [index, folder / "data.js", *folder.glob("attention/*")])
    assert size < 40e6
    browser.get("about:blank")
    before = busy_seconds(browser)
    browser.get(index.as_uri())
    wait(browser, "return document.querySelectorAll('.card img').length > 3")
    loading = 1000 * (busy_seconds(browser) - before)
    first = browser.execute_async_script(LARGEST_PAINT)
    sorting = browser.execute_script(
        "const began = performance.now(); sortBy('CIDEr'); document.body.offsetHeight;"
        "return performance.now() - began"
    )
    frames, before = 150, busy_seconds(browser)
    browser.execute_async_script(SCROLL, frames)
    frame = 1000 * (busy_seconds(browser) - before) / frames
    print(f"data {size / 1e6:.1f} MB; first cards after {first:.0f} ms, {loading:.0f} of them work; ")
    print(f"sorting {sorting:.0f}, frame {frame:.1f} ms")
    browser.execute_script("scrollTo(0, document.body.scrollHeight / 2)")
    wait(browser, "return document.elementFromPoint(300, 400).closest('.card')?.querySelector('.w') != null")
    assert 0 < loading < 1000 and sorting < 1000
    assert frame < 20  # milliseconds of work in a frame while scrolling


def busy_seconds(browser) -> float:
    """The processor time of the page's tasks so far, which does not depend on what else the machine does."""
    browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    metrics = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    return {metric["name"]: metric["value"] for metric in metrics}["TaskDuration"]
