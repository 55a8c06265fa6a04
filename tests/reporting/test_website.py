"""The site of latents: its files, and its pages as Chromium shows them from a disk."""

import json
import re
from pathlib import Path

import pytest

from gemmascope.reporting import website
from gemmascope.reporting.website import write_website
from tests import chromium

from .made_up import HOSTILE, STRINGS, write_dashboards

RESULTS = [{"name": "layer_2/mlp 20", "fvu": 0.1234, "delta_loss": None}, {"name": "another", "fvu": 0.9}]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "dashboards"
    write_website(write_dashboards(folder), folder / "site", results=RESULTS)
    return folder / "site"


# ---- files


def test_files_are_those_returned_and_the_index_comes_first(tmp_path):
    overview, folder, done = write_dashboards(tmp_path / "dashboards", d_sae=300), tmp_path / "site", []
    written = write_website(overview, folder, check=done.append)
    assert done == [256, 300, 556, 600]
    found = {path for path in folder.rglob("*") if path.is_file()}
    assert set(written) == found
    assert len(written) == len(found)
    assert written[0] == folder / "index.html"
    before = {path: path.read_bytes() for path in found}
    (folder / "saes" / "old").mkdir()
    (folder / "text-7.js").touch()
    write_website(overview, folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert not (folder / "saes" / "old").exists()


def test_a_site_that_is_stopped_has_no_index(tmp_path):
    overview = write_dashboards(tmp_path / "dashboards", d_sae=40)
    write_website(overview, tmp_path / "site")

    def stop(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_website(overview, tmp_path / "site", check=stop)
    assert not (tmp_path / "site" / "index.html").exists()


def test_other_files_are_left_alone(tmp_path):
    overview = write_dashboards(tmp_path / "dashboards", d_sae=40)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="folder: expected a new one or that of an earlier site"):
        write_website(overview, tmp_path / "mine")
    with pytest.raises(ValueError, match="folder: expected a new one or that of an earlier site"):
        write_website(overview, tmp_path / "mine" / "thesis.txt")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(TypeError, match="results: expected"):
        write_website(overview, tmp_path / "site", results=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="overview: expected"):
        write_website(tmp_path, tmp_path / "site")  # pyright: ignore[reportArgumentType]


def test_pages_say_what_they_are_of_and_escape_it(site):
    for path in (site / "index.html", site / "saes" / "layer_1-resid" / "index.html"):
        page = path.read_text(encoding="utf-8")
        assert "a &lt;b&gt;model&lt;/b&gt;" in page
        assert "384 tokens in 12 rows of 32 of made-up text &amp; more" in page
        assert "Seed 3. gemmascope " in page
        assert "Content-Security-Policy" in page
        assert not re.search(r"https?:|//[a-z]|<script(?! src=)|style=|onclick", page)


def test_scripts_speak_of_no_network_and_no_markup():
    script = website._asset("site.js")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(|XMLHttp|WebSocket", script)
    urls = set(re.findall(r"https?://[^\"'\s]+", script + website._asset("site.css")))
    assert urls == {"http://www.w3.org/2000/svg"}


# ---- in a browser


@pytest.fixture(scope="module")
def browser():
    if chromium.PROGRAM is None:
        pytest.skip(chromium.WHY_NOT)
    with chromium.browser() as running:
        yield running


@pytest.fixture
def page(browser, site):
    """Opens a page of the site, and sees at the end that all was well in it and that nothing came from elsewhere."""
    opened = []

    def opens(path="saes/layer_1-resid/index.html", **how):
        found = browser.page(f"{site.as_uri()}/{path}", **how)
        opened.append(found)
        if path.startswith("saes"):
            found.wait("!document.getElementById('list').hidden || !document.getElementById('latent').hidden")
            found.wait(f"location.hash.match(/^#\\d/) || /^[\\d,]+ of 300 latents$/.test({COUNT})")
        return found

    yield opens
    for each in opened:
        assert each.problems() == []
        assert [url for url in each.requests() if not url.startswith(site.as_uri())] == []
        each.close()


COUNT = "document.getElementById('count').textContent"
LISTED = "[...document.querySelectorAll('.row .id')].map(e => +e.textContent).sort((a, b) => a - b)"
ORDER = """[...document.querySelectorAll('#rows > div')].sort((a, b) => a.ariaPosInSet - b.ariaPosInSet)
.map(e => +e.querySelector('.id').textContent)"""
HEADING = "document.getElementById('heading')?.textContent"
TEXTS = "[...document.querySelectorAll('.best .text')].map(e => e.textContent)"
WIDE = "document.documentElement.scrollWidth"
ELEMENTS = "body *:not(.chips *, .chip *)"  # a list of tokens is cut off where it does not fit
FOCUSED = "document.activeElement.querySelector('.id')?.textContent"


def search(page, text):
    page.run(f"""(() => {{ const box = document.getElementById('search'); box.value = {json.dumps(text)};
    box.dispatchEvent(new Event('input')); }})()""")


def choose(page, box, value):
    page.run(f"""(() => {{ const box = document.getElementById('{box}'); box.value = '{value}';
    box.dispatchEvent(new Event('change')); }})()""")


def peaks(overview_folder, latent):
    """The texts of the largest activations of a latent's examples, from the table."""
    from gemmascope.dashboards.overview import Overview

    overview = Overview.open(overview_folder)
    top = overview.table("layer_1/resid").top
    ids = overview.window_tokens(top)[latent][top.there[latent]]
    return [[STRINGS[token] for token in window] for window in ids.tolist()]


def test_suite_links_to_each_sae(page):
    first = page("index.html")
    rows = first.run("[...document.querySelectorAll('tbody tr')].map(e => e.innerText.split(/\\s+/).join(' '))")
    assert len(rows) == 2
    assert rows[0].startswith("layer_1/resid resid 1 300 ")
    assert rows[0].split()[-2:] == ["–", "10.0%"]
    assert rows[1].split()[-2:] == ["0.123", "10.0%"]
    first.run("document.querySelectorAll('td a')[1].click()")
    first.wait("location.pathname.endsWith('saes/layer_2-mlp-20/index.html')")
    first.wait(f"typeof window.gemmascope === 'object' && {COUNT} === '300 of 300 latents'")
    assert first.run("document.querySelector('h1').textContent") == "layer_2/mlp 20"
    assert not any("layer_1-resid" in url for url in first.requests())


def test_list_shows_part_of_all_rows_and_scrolls_to_the_last(page):
    list_ = page()
    assert list_.run(ORDER)[:5] == [0, 1, 2, 3, 4]
    assert list_.run("document.querySelectorAll('.row').length") < 60
    list_.run("scrollTo(0, document.documentElement.scrollHeight)")
    list_.wait(f"{LISTED}.at(-1) === 299")
    assert list_.run("document.querySelectorAll('.row').length") < 60


def test_search_finds_tokens_and_numbers(page):
    list_ = page()
    liked = STRINGS.index(" which")
    search(list_, "WHICH")
    choose(list_, "in", "firing")
    found = list_.run(LISTED)
    assert liked in found
    assert all(latent % len(STRINGS) in (liked, liked - 1) for latent in found)
    assert list_.run("location.hash") == "#q=WHICH&in=firing"
    search(list_, "137")
    assert list_.run(ORDER)[0] == 137
    search(list_, "which of")
    assert list_.run(LISTED) == []
    assert list_.run("document.getElementById('none').hidden") is False
    search(list_, "⏎")
    assert list_.run(LISTED), "a sign stands for what it is the sign of"
    search(list_, "日本")
    assert STRINGS.index("日本語") in list_.run(LISTED)
    search(list_, "")
    assert list_.run(COUNT) == "300 of 300 latents"


def test_filters_and_orders(page):
    list_ = page()
    choose(list_, "fires", "dead")
    assert list_.run(COUNT) == "30 of 300 latents"
    assert (shown := list_.run(LISTED)) == list(range(0, 10 * len(shown), 10))
    choose(list_, "fires", "alive")
    assert list_.run(COUNT) == "270 of 300 latents"
    list_.run("document.querySelector('[data-sort=max]').click()")
    largest = "e => parseFloat(e.querySelector('.most').lastChild.textContent)"
    most = list_.run(ORDER.replace("e => +e.querySelector('.id').textContent", largest))
    assert most == sorted(most, reverse=True)
    assert len(set(most)) > 5
    list_.run("document.querySelector('[data-sort=max]').click()")
    least = list_.run(ORDER.replace("e => +e.querySelector('.id').textContent", largest))
    assert least == sorted(least)
    assert least[0] < most[-1]
    assert list_.run("document.querySelector('[data-sort=max]').ariaPressed") == "true"
    same = page(f"saes/layer_1-resid/index.html{list_.run('location.hash')}")
    assert same.run(ORDER) == list_.run(ORDER), "an address is that of a list as it was"


def test_latent_shows_its_examples_figures_and_neighbours(page, site):
    latent = page("saes/layer_1-resid/index.html#33")
    latent.wait(f"{HEADING} === 'Latent 33'")
    assert latent.run("document.title") == "33 · layer_1/resid"
    texts = latent.run(TEXTS)
    expected = peaks(site.parent, 33)
    assert len(texts) == len(expected) > 2
    for text, window in zip(texts, expected, strict=True):
        words = [token for token in window if token in STRINGS[len(HOSTILE) :]]
        assert all(word in text for word in words)
    active = latent.run("[...document.querySelectorAll('.best .peak')].map(e => e.dataset.tip)")
    assert all(tip.startswith(("␣is  ", "␣that  ")) for tip in active)
    assert len(active) == len(texts)
    values = [float(tip.split()[-1]) for tip in active]
    assert values == sorted(values, reverse=True)
    links = latent.run("[...document.querySelectorAll('.side a')].map(e => e.hash)")
    assert len(links) == 8
    latent.run("document.querySelector('.side a').click()")
    latent.wait(f"{HEADING} === 'Latent {links[0][1:]}'")
    latent.run("history.back()")
    latent.wait(f"{HEADING} === 'Latent 33'")


def test_dead_latent_says_so(page):
    latent = page("saes/layer_1-resid/index.html#10")
    latent.wait(f"{HEADING} === 'Latent 10'")
    assert "It fired on none of 384 tokens." in latent.run("document.getElementById('latent').innerText")
    assert latent.run("document.querySelectorAll('.text, .bars').length") == 0


@pytest.mark.parametrize("hash", ["#999", "#q=%E0%A4%A&sort=__proto__&in=x&fires=toString", "#-1", "#1e3"])
def test_addresses_that_are_none_show_the_list(page, hash):
    list_ = page(f"saes/layer_1-resid/index.html{hash}")
    list_.wait(f"{COUNT} === '300 of 300 latents'")
    assert list_.run(ORDER)[:3] == [0, 1, 2]


def test_keys(page):
    list_ = page()
    list_.press("/")
    assert list_.run("document.activeElement.id") == "search"
    list_.type("of")
    list_.wait(f"{COUNT} !== '300 of 300 latents'")
    order = list_.run(ORDER)
    list_.press("Enter")
    assert list_.run(FOCUSED) == str(order[0])
    list_.press("j", "ArrowDown", "k")
    assert list_.run(FOCUSED) == str(order[1])
    list_.press("Enter")
    list_.wait(f"{HEADING} === 'Latent {order[1]}'")
    list_.press("j")
    list_.wait(f"{HEADING} === 'Latent {order[2]}'")
    list_.press("ArrowLeft")
    list_.wait(f"{HEADING} === 'Latent {order[1]}'")
    list_.press("Escape")
    list_.wait("!document.getElementById('list').hidden")
    assert list_.run(ORDER) == order, "the list is as it was left"
    assert list_.run(FOCUSED) == str(order[1])
    list_.press("End")
    list_.wait(f"{FOCUSED} === String({ORDER}.at(-1))")


def test_active_tokens_are_reached_by_keys(page):
    latent = page("saes/layer_1-resid/index.html#33")
    latent.wait(f"{HEADING} === 'Latent 33'")
    for _ in range(12):
        latent.press("Tab")
        if latent.run("document.activeElement.className") == "text":
            break
    tip = "document.getElementById('tip').hidden ? null : document.getElementById('tip').textContent"
    first = latent.run(tip)
    assert first == latent.run("document.querySelector('.best .peak').dataset.tip")
    latent.press("ArrowRight", "ArrowRight")
    last = latent.run("[...document.activeElement.querySelectorAll('.act')].at(-1).dataset.tip")
    assert latent.run(tip) == last
    assert latent.run(HEADING) == "Latent 33", "arrows in an example leave the latent alone"
    latent.press("Tab")
    assert latent.run("document.querySelectorAll('.here').length") == 1


def test_hostile_tokens_are_text(page):
    """Every latent that fires on one, or raises one: no element comes of it, and what cannot be seen is signed."""
    latent = page("saes/layer_1-resid/index.html#1")
    tags = "[...new Set([...document.querySelectorAll('main *')].map(e => e.localName))].sort().join(' ')"
    known = {"a", "b", "bdi", "div", "figcaption", "figure", "h2", "h3", "i", "li", "ol", "p", "section", "span", "ul"}
    shown = ""
    for number in range(1, len(HOSTILE) + 1):
        if number % 10:
            latent.run(f"location.hash = '#{number}'")
            latent.wait(f"{HEADING} === 'Latent {number}'")
            found = set(latent.run(tags.replace("main *", "#latent *")).split())
            assert found <= known, found - known
            shown += latent.run("document.getElementById('latent').innerText")
    assert latent.run("document.querySelectorAll('img, script:not([src])').length") == 0
    for text in ("<script>alert(1)</script>", '"><img␣src=x␣onerror=alert(1)>', "‹202E›esrever", "‹200B›", "‹0000›"):
        assert text in shown
    for text in ("‹001B›[31m", "⏎", "⇥", "␣␣", "‹2028›", "‹FEFF›", "◌\u0301", "日本語", "שלום", "a" * 40 + "…"):
        assert text in shown
    assert not re.search("[\u202e\u200b\x00\x1b\u2028\ufeff]", shown)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_is_wider_than_a_phone(page, scheme):
    for path in ("index.html", "saes/layer_1-resid/index.html", "saes/layer_1-resid/index.html#33"):
        narrow = page(path, width=360, height=640, scheme=scheme)
        assert narrow.run(WIDE) <= 360
        assert narrow.run(
            f"[...document.querySelectorAll({ELEMENTS!r})].every(e => e.getBoundingClientRect().right < 361)"
        )
    list_ = page("saes/layer_1-resid/index.html", width=360, height=640)
    assert list_.run("document.querySelector('.row').getBoundingClientRect().height") == 91
    assert list_.run("document.querySelector('.head').offsetParent") is None


CONTRAST = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const over = (colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => rgb.map(c => c / 255).map(c => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const worst = {};
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || !element.getClientRects().length || element.matches('option, noscript *')) continue;
    const behind = [];
    for (let at = element; at; at = at.parentElement) behind.unshift(getComputedStyle(at).backgroundColor);
    const paper = over(behind), ink = over([...behind, getComputedStyle(element).color]);
    const [a, b] = [light(paper), light(ink)].sort((x, y) => y - x);
    const name = element.localName + '.' + element.className;
    worst[name] = Math.min(worst[name] ?? 99, (a + .05) / (b + .05));
  }
  return worst;
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_of_all_text(page, scheme):
    """WCAG 2.2's 4.5 for every text on what lies behind it, the strongest activation included."""
    for path in ("index.html", "saes/layer_1-resid/index.html", "saes/layer_1-resid/index.html#33"):
        shown = page(path, scheme=scheme)
        shown.run("document.querySelectorAll('.act').forEach(e => e.style.setProperty('--a', 1))")
        found = shown.run(CONTRAST)
        assert min(found.values()) >= 4.5, found
        assert any(name.startswith("span.act") for name in found) or "#" not in path


def test_a_missing_file_is_said(browser, site, tmp_path):
    import shutil

    shutil.copytree(site, tmp_path / "site")
    (tmp_path / "site" / "saes" / "layer_1-resid" / "data" / "latents-0.js").unlink()
    broken = browser.page(f"{(tmp_path / 'site').as_uri()}/saes/layer_1-resid/index.html#33")
    broken.wait("document.querySelector('[role=alert]') !== null")
    message = broken.run("document.querySelector('[role=alert]').textContent")
    assert message == "This page cannot be shown: data/latents-0.js is missing or cannot be read."
    broken.close()


def test_large_lists_stay_within_what_browsers_draw(browser, site, tmp_path):
    """An SAE of a million latents, as far as the list goes: its height is bounded, its ends are reached."""
    import shutil

    from gemmascope.reporting.latents import call

    shutil.copytree(site, tmp_path / "site")
    data = Path(tmp_path / "site" / "saes" / "layer_1-resid" / "data")
    facts = json.loads((data / "facts.js").read_text()[len("gemmascope.sae(") : -3])
    (data / "facts.js").write_text(call("sae", facts | {"width": 1_000_000, "list_chunk": 1_000_000}))
    big = browser.page(f"{(tmp_path / 'site').as_uri()}/saes/layer_1-resid/index.html")
    big.wait("document.querySelectorAll('.row').length > 5")
    assert big.run("document.getElementById('rows').offsetHeight") <= 8e6
    big.run("scrollTo(0, document.documentElement.scrollHeight)")
    big.wait(f"{LISTED}.at(-1) === 999999")
    assert big.run(LISTED)[0] > 999_900
    big.run("scrollTo(0, 4e6)")
    big.wait(f"Math.abs({LISTED}[0] - 5e5) < 5000")
    big.close()
