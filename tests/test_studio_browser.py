"""The studio in a real headless Chromium, end to end.

Screenshots go into the folder that TEXTCOND_SCREENSHOTS names (the README shows those in apps/studio/screenshots), else
into pytest's temporary folder (see --basetemp).
"""

import base64
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import browser
import pytest
from PIL import Image
from styled_index import TEXTS, styled_index
from tiny_reference import PROMPTS

from textcond.apps.finder import open_index
from textcond.apps.metadata import Parameters, read_parameters, write_png

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (browser.CHROMIUM and browser.DRIVER),
        reason="needs chromium and chromedriver (apt install chromium chromium-driver fonts-noto-core fonts-noto-cjk)",
    ),
]

PROMPT = "document.querySelector('#prompt textarea')?.value"
PICTURE = "document.querySelector('#picture img')?.naturalWidth"
SOURCE = "document.querySelector('#picture img')?.src"
STATUS = "(document.querySelector('#status')?.innerText ?? '')"
FOUND = "[...document.querySelectorAll('#found .caption-label')].map(label => label.innerText)"
HEAD = "(document.querySelector('#found-head')?.innerText ?? '')"
MADE = "document.querySelectorAll('#made .gallery-item').length"
SEED = "document.querySelector('#seed input')?.value"
READY = "!document.querySelector('#generate').disabled"
TABS = "document.querySelectorAll('#tabs button[role=tab]')"
CTRL, ENTER, ESCAPE, DELETE, TAB = "\ue009", "\ue007", "\ue00c", "\ue003", "\ue004"
RELEASE = "\ue000"
PATIENCE = 180  # the first use of an encoder loads a model, on a machine that may have other things to do


class Server:
    """`textcond studio` as a person starts it."""

    def __init__(self, pictures: Path, *options: str):
        self.options = ["--pictures", str(pictures), *options]
        self.folder = pictures  # to run in: it offers the encoders that lie below
        pictures.mkdir(exist_ok=True)
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "textcond.apps.cli", "studio", *self.options]
        self.process = subprocess.Popen(
            command, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.address = self.process.stdout.readline().split()[2]

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def close(self) -> None:
        self.process.send_signal(signal.SIGINT)
        _, err = self.process.communicate(timeout=60)
        assert self.process.returncode == 130
        assert "Traceback" not in err


@pytest.fixture(scope="module")
def server(demo, tmp_path_factory):
    started = Server(tmp_path_factory.mktemp("pictures"), *_options(demo))
    yield started
    started.close()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """With the model that is shipped, as on a first visit."""
    started = Server(tmp_path_factory.mktemp("reference"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def styled(demo, tmp_path_factory):
    """With an index that has styles and languages."""
    folder = tmp_path_factory.mktemp("styled")
    index = styled_index(folder / "index", demo)
    started = Server(folder / "pictures", "--pipeline", demo.pipeline, "--index", str(index))
    yield started
    started.close()


def _options(demo):
    return "--pipeline", demo.pipeline, "--index", demo.index


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    opened = browser.Browser(tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory):
    folder = Path(os.environ.get("TEXTCOND_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _open(window, address):
    """Leave the page that is there, and whatever it says of being left, for a fresh one."""
    window.open("about:blank")
    window.log("browser")
    window.requests()
    window.open(address)
    window.until(f"{FOUND}.length >= {len(PROMPTS)}", "the first prompts", PATIENCE)


def _check_console(window):
    severe = [entry["message"] for entry in window.log("browser") if entry["level"] == "SEVERE"]
    # gradio's own page says these of the stream that it closes when it is reloaded.
    closed = ("signal is aborted without reason", "BodyStreamBuffer was aborted", "Connection errored out.")
    assert not [message for message in severe if not any(one in message for one in closed)]


@pytest.fixture
def page(server, window):
    yield from _visit(server, window)


@pytest.fixture
def visitor(reference, window):
    yield from _visit(reference, window)


@pytest.fixture
def explorer(styled, window):
    yield from _visit(styled, window)


def _visit(server, window):
    """A first visit, and at the end no console error and no request that leaves the machine."""
    window.look(width=1280, height=900)
    window.open(f"{server.address}theme.css")
    window.script("localStorage.clear()")
    _open(window, server.address)
    yield window
    near = (server.address, "data:", "blob:", "chrome:", "about:")
    assert not {url for url in window.requests() if not url.startswith(near)}
    _check_console(window)


def _write(page, text, box="#prompt textarea"):
    page.keys(box, f"{CTRL}a{RELEASE}{text or DELETE}")


def _number(page, box, value):
    page.keys(f"{box} input[type=number]", f"{CTRL}a{RELEASE}{value}{TAB}")


def _drawn(page):
    page.until(f"{STATUS}.includes('seed') && {READY}", "the picture", PATIENCE)


def _draw(page):
    page.click("#generate")
    page.until(f"!{STATUS}.includes('seed')", "the start")
    _drawn(page)


def _unfold(page, box, inside):
    page.click(f"{box} button")
    page.until(f"document.querySelector('{inside}')?.offsetParent", "what is folded")


def _tab(page, title):
    page.script(f"[...{TABS}].find(tab => tab.textContent.trim() == arguments[0]).click()", title)


def _choose(page, box, label):
    """Click until it stays: what has just been unfolded takes its first value a moment later."""
    click = (
        "const input = [...document.querySelectorAll(`${arguments[0]} label`)]"
        ".find(one => one.innerText.trim() == arguments[1]).querySelector('input');"
        "const was = input.checked; if (!was) input.click(); return was"
    )
    page.until(lambda: page.script(click, box, label), f"the choice {label!r}")


def test_a_prompt_is_found_used_drawn_and_brought_back(page):
    _write(page, "red fox, noto style")
    page.until(f"{FOUND}[0] == 'red fox, noto style'", "the nearest prompt")
    third = page.script(f"return {FOUND}[2]")
    page.click("#found .gallery-item:nth-child(3) button")
    page.until(f"{PROMPT} == {third!r}", "the clicked prompt")
    _draw(page)
    assert page.until(PICTURE, "the picture to load") == 128
    first = page.script(f"return {STATUS}")
    _write(page, "blue apple")
    page.keys("#prompt textarea", ENTER)
    page.until(f"{MADE} == 2", "a second picture", PATIENCE)
    page.until(READY, "the end of the drawing")
    page.click("#made .gallery-item:nth-child(2) button")
    page.until(f"{PROMPT} == {third!r}", "the earlier prompt")
    assert f"seed {page.script(f'return {SEED}')} " in first
    assert not page.script("return document.querySelector('#random input').checked")


ENCODER = "document.querySelector('#encoder input').value"


def test_a_japanese_prompt_draws_and_finds_on_a_first_visit_and_the_picture_finds_what_is_on_it(visitor, tmp_path):
    assert visitor.script(f"return {ENCODER}") == "multilingual"
    _write(visitor, "黄色い猫")
    visitor.until(
        f"{HEAD}.includes('by the same encoder') && {FOUND}[0].endsWith('猫')", "the nearest prompts", PATIENCE
    )
    _draw(visitor)
    made = _downloaded(visitor, tmp_path / "cat.png")
    assert (made.prompt, made.encoder, made.pipeline) == ("黄色い猫", "multilingual", "reference")

    _write(visitor, "赤いハート")
    _number(visitor, "#seed", 7)
    visitor.click("#reuse")
    _draw(visitor)
    _write(visitor, "a prompt that says nothing of it")
    visitor.until(f"{HEAD}.includes('by the same encoder') && !{FOUND}.join().includes('ハート')", "others", PATIENCE)
    others = visitor.script(f"return {FOUND}.join()")
    visitor.click("#similar")
    changed = f"{FOUND}.join() != {others!r}"  # the page writes its heading before its tiles
    visitor.until(
        f"{HEAD}.includes('To the picture, by what is on it') && {changed}", "what is like the picture", PATIENCE
    )
    found = visitor.script(f"return {FOUND}")
    concepts = {row.text: row.metadata["concept"] for row in open_index().rows()}
    assert sum("heart" in concepts[caption.split(" · ", 1)[1]] for caption in found) >= 4, found


def test_a_picture_that_says_native_is_drawn_by_the_native_encoder(visitor, tmp_path):
    write_png(tmp_path / "apple.png", Image.new("RGB", (8, 8)), Parameters("red apple", seed=77, encoder="native"))
    _drop(visitor, "apple.png", (tmp_path / "apple.png").read_bytes())
    visitor.until(f"{PROMPT} == 'red apple' && {ENCODER} == 'native'", "the settings")
    _draw(visitor)
    assert _downloaded(visitor, tmp_path / "again.png").encoder == "native"
    visitor.until(f"{HEAD}.includes('by the same encoder')", "the prompts read by that encoder", PATIENCE)


def test_surprise_me_draws_one_of_the_prompts(page):
    page.click("#surprise")
    _drawn(page)
    assert page.script(f"return {PROMPT}") in PROMPTS


def test_the_keyboard_generates_and_stops(page):
    _number(page, "#steps", 60)
    page.keys("#negative textarea", f"snow{CTRL}{ENTER}{RELEASE}")
    page.until(f"{STATUS}.includes('Step')", "the first step", PATIENCE)
    page.keys("#negative textarea", ESCAPE)
    page.until(f"{STATUS}.includes('Stopped') && {READY}", "the stop")
    assert not page.script(f"return {MADE}")
    _number(page, "#steps", 2)
    _draw(page)


def test_the_downloaded_picture_carries_what_made_it(page, tmp_path):
    _write(page, "red fox")
    _draw(page)
    assert _downloaded(page, tmp_path / "fox.png").prompt == "red fox"


def _downloaded(page, path):
    """Save the picture that is shown; what its metadata say."""
    with urllib.request.urlopen(page.until(SOURCE, "the picture")) as answer:
        path.write_bytes(answer.read())
    return read_parameters(path)


def test_a_reload_and_a_link_bring_everything_back(page, server):
    _write(page, "red fox")
    _number(page, "#steps", 3)
    _draw(page)
    seed = page.script(f"return {SEED}")
    address = page.until("location.href.includes('#prompt=') && location.href", "the address")
    assert f"seed={seed}" in address
    page.until(f"{HEAD}.includes('by the same encoder')", "the neighbours")
    page.script("location.reload()")
    page.until(f"{MADE} == 1 && {PROMPT} == 'red fox'", "the history", PATIENCE)
    page.until(f"{STATUS}.includes('seed {seed} · 3 steps')", "the picture of the link")
    page.until(f"{HEAD}.includes('by the same encoder')", "the neighbours")
    _check_console(page)
    page.script("localStorage.clear()")
    _open(page, address)
    page.until(f"{PROMPT} == 'red fox' && {SEED} == '{seed}'", "the settings of the link", PATIENCE)
    assert not page.script(f"return {MADE}")
    page.until(f"{HEAD}.includes('by the same encoder')", "the neighbours")
    page.script("location.hash = 'prompt=a+blue+owl&seed=4'")
    page.until(f"{PROMPT} == 'a blue owl' && {SEED} == '4'", "a link that is pasted into the open page", PATIENCE)


def test_light_and_dark_are_a_click_apart_and_stay_so(page):
    dark = "document.body.classList.contains('dark')"
    before = page.script(f"return {dark}")
    page.click("#shade")
    assert page.script(f"return {dark}") != before
    page.script("location.reload()")
    page.until(f"{FOUND}.length > 0 && {dark} != {str(before).lower()}", "the same shade", PATIENCE)
    page.script("localStorage.removeItem('textcond-shade')")


def test_a_picture_is_dropped_in_and_its_settings_come_back(page, tmp_path):
    parameters = Parameters("blue apple, blob style", "snow", seed=77, num_inference_steps=5, guidance_scale=3.0)
    write_png(tmp_path / "apple.png", Image.new("RGB", (8, 8)), parameters)
    _tab(page, "Grid")
    _drop(page, "apple.png", (tmp_path / "apple.png").read_bytes())
    page.until(f"{PROMPT} == 'blue apple, blob style' && {SEED} == '77'", "the settings")
    assert page.script("return Boolean(document.querySelector('#prompt').offsetParent)")  # on the first tab
    assert page.script("return document.querySelector('#steps input[type=number]').value") == "5"
    assert not page.script("return document.querySelector('#random input').checked")


@pytest.mark.parametrize(
    ("name", "content"),
    [("page.png", b"<script>alert(1)</script>"), ("empty.png", b""), ("notes.txt", b"hello")],
    ids=["no picture", "empty", "text"],
)
def test_a_wrong_file_is_explained_and_the_page_lives_on(page, name, content):
    _drop(page, name, content)
    said = f"({STATUS} + [...document.querySelectorAll('.toast-body')].map(one => one.innerText).join())"
    page.until(f"/readable picture|nvalid file|upload/i.test({said})", "the reason")
    page.script("document.querySelector('.toast-close')?.click()")
    _draw(page)


def _drop(page, name, content):
    page.script(
        "const bytes = Uint8Array.from(atob(arguments[1]), letter => letter.charCodeAt(0));"
        "const data = new DataTransfer();"
        "const type = arguments[0].endsWith('png') ? 'image/png' : 'text/plain';"
        "data.items.add(new File([bytes], arguments[0], {type}));"
        "document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true}))",
        name,
        base64.b64encode(content).decode(),
    )


def test_clicks_append_and_find_similar_and_words_can_decide(page):
    _choose(page, "#mode", "words")
    _write(page, "blob apple")
    page.until(f"{HEAD}.includes('words they share') && {FOUND}[0].endsWith('apple, blob style')", "the order by words")
    _choose(page, "#click", "appends")
    page.click("#found .gallery-item:nth-child(1) button")
    page.until(f"{PROMPT}.startsWith('blob apple, ')", "the longer prompt")
    page.until(f"{FOUND}.length > 0", "the neighbours")
    _choose(page, "#click", "finds similar")
    page.click("#found .gallery-item:nth-child(1) button")
    page.until(f"{HEAD}.includes('Similar to')", "what is similar")
    _draw(page)
    page.click("#similar")
    page.until(f"{HEAD}.includes('To the picture')", "what is like the picture")


def test_what_is_saved_is_found_and_a_click_brings_its_seed(page):
    _write(page, "a purple owl")
    _write(page, "snow", "#negative textarea")
    _draw(page)
    seed = page.script(f"return {SEED}")
    page.click("#save")
    page.until(f"{STATUS}.includes('Saved')", "the saving", PATIENCE)
    _write(page, "a purple owl!")
    page.until(f"{FOUND}[0].includes('a purple owl')", "the saved picture")
    _write(page, "", "#negative textarea")
    _number(page, "#seed", 0)
    page.click("#found .gallery-item:nth-child(1) button")
    page.until(f"{PROMPT} == 'a purple owl' && {SEED} == '{seed}'", "prompt and seed")
    assert page.script("return document.querySelector('#negative textarea').value") == "snow"


STARS = "[...document.querySelectorAll('#made .star')].map(star => star.getAttribute('aria-pressed') == 'true')"
SHOWN = "[...document.querySelectorAll('#made .gallery-item')].filter(item => item.offsetParent).length"


def test_a_star_keeps_a_picture_and_only_favourites_may_be_shown(page):
    _unfold(page, "#more", "#pictures input")
    _number(page, "#pictures", 3)
    _draw(page)
    page.until(f"{STARS}.join() == 'false,false,false'", "the stars", PATIENCE)
    page.click("#made .gallery-item:nth-child(2) .star")
    page.until(f"{STARS}.join() == 'false,true,false'", "the favourite")
    assert "seed" in page.script(f"return {STATUS}")
    page.click("#only-stars input")
    page.until(f"{SHOWN} == 1", "the favourite alone")
    page.script("location.reload()")
    page.until(f"{STARS}.join() == 'false,true,false' && {SHOWN} == 3", "all of them", PATIENCE)
    page.until(f"{FOUND}.length >= {len(PROMPTS)}", "the prompts", PATIENCE)
    page.click("#made .gallery-item:nth-child(2) .star")
    page.until(f"{STARS}.join() == 'false,false,false'", "no favourite")
    _check_console(page)


def test_several_pictures_of_a_size_and_sampler(page):
    _unfold(page, "#more", "#pictures input")
    _number(page, "#width", 64)
    _number(page, "#height", 96)
    _number(page, "#pictures", 3)
    _draw(page)
    page.until(f"{MADE} == 3", "three pictures", PATIENCE)
    assert "64×96" in page.script(f"return {STATUS}")


def _laid(slider, page):
    """Where the two pictures of a slider lie."""
    return page.script(
        "return [...document.querySelectorAll(`${arguments[0]} img`)].map(image =>"
        " { const box = image.getBoundingClientRect(); return [box.left, box.top, box.width, box.height] })",
        slider,
    )


def test_encoders_side_by_side(page, demo):
    _write(page, "red fox")
    _tab(page, "Compare")
    page.until("document.querySelector('#compare-prompt textarea')?.value == 'red fox'", "the prompt")
    page.keys("#compare-encoders input", f"{demo.encoder}{ENTER}")
    page.click("#compare")
    page.until("document.querySelector('#why table')?.offsetParent", "the table", PATIENCE)
    page.until("document.querySelectorAll('#ab img').length == 2", "two pictures")
    rows = page.script("return [...document.querySelectorAll('#why tbody tr')].map(row => row.innerText)")
    assert [row.split("\t")[0] for row in rows] == ["native", "demo0/encoder"]
    sources = page.script("return [...document.querySelectorAll('#ab img')].map(image => image.src)")
    assert len(set(sources)) == 2
    page.until(lambda: len({tuple(box) for box in _laid("#ab", page)}) == 1, "them to lie on each other")


def test_the_native_encoder_beside_the_multilingual_one(visitor, screenshots):
    _write(visitor, "赤いハート")
    _number(visitor, "#seed", 7)
    _tab(visitor, "Compare")
    visitor.until("document.querySelector('#compare-prompt textarea')?.value == '赤いハート'", "the prompt")
    visitor.click("#compare")
    visitor.until("document.querySelector('#why table')?.offsetParent", "the table", PATIENCE)
    rows = visitor.script("return [...document.querySelectorAll('#why tbody th')].map(one => one.innerText)")
    assert rows == ["native", "multilingual"]
    found = "[...document.querySelectorAll('.tiles .caption-label')].filter(one => one.offsetParent)"
    visitor.until(f"{found}.length == 12", "the neighbours")
    assert visitor.script(f"return {found}[6].innerText") == "1.00 · 赤いハート"
    visitor.until(lambda: len({tuple(box) for box in _laid("#ab", visitor)}) == 1, "them to lie on each other")
    visitor.screenshot(screenshots / "compare.webp")


CELLS = "[...document.querySelectorAll('#cells td img')].filter(image => image.naturalWidth).length"
GRID = "(document.querySelector('#grid-status')?.innerText ?? '')"


def _side(page, name, what, values):
    page.keys(f"#grid-{name} input", f"{CTRL}a{RELEASE}{what}{ENTER}")
    page.until(f"document.querySelector('#grid-{name} input').value == {what!r}", "the side")
    _write(page, values, f"#grid-{name}-values textarea, #grid-{name}-values input")


def test_a_grid_is_drawn_and_downloaded_and_a_click_brings_a_cell_back(visitor, screenshots, tmp_path):
    _write(visitor, "red apple, noto style")
    _number(visitor, "#seed", 7)
    _tab(visitor, "Grid")
    visitor.until("document.querySelector('#grid-prompt textarea')?.value == 'red apple, noto style'", "the prompt")
    _side(visitor, "columns", "prompt words", "noto, blob, flat, fluent, twemoji, firefox")
    _side(visitor, "rows", "guidance", "1-7(3)")
    visitor.click("#grid")
    visitor.until(f"{GRID}.includes('18 pictures in') && {CELLS} == 18", "the grid", PATIENCE)
    heads = visitor.script("return [...document.querySelectorAll('#cells th')].map(one => one.innerText)")
    assert heads == ["noto", "blob", "flat", "fluent", "twemoji", "firefox", "guidance 1", "guidance 4", "guidance 7"]
    visitor.screenshot(screenshots / "grid.webp")
    visitor.cdp("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    visitor.click("#grid-download")
    visitor.until((tmp_path / "grid.png").exists, "the download")
    assert read_parameters(tmp_path / "grid.png").prompt == "red apple, noto style"
    visitor.click("#cells [data-cell='14']")
    visitor.until(f"{PROMPT} == 'red apple, flat style' && {SEED} == '7'", "the settings")
    visitor.until(f"{STATUS}.includes('seed 7 · 20 steps · guidance 7') && {PICTURE} == 128", "the picture")
    visitor.until("document.querySelector('#prompt').offsetParent", "the first tab")


def test_a_grid_stops(page):
    _write(page, "red fox")
    _tab(page, "Grid")
    page.until("document.querySelector('#grid-prompt textarea')?.value == 'red fox'", "the prompt")
    _side(page, "columns", "steps", "60")
    _side(page, "rows", "seed", "1-36")
    page.keys("#grid-prompt textarea", f"{CTRL}{ENTER}{RELEASE}")
    page.until(f"{CELLS} >= 1", "the first cell", PATIENCE)
    page.keys("#grid-prompt textarea", ESCAPE)
    page.until(f"{GRID} == 'Stopped.' && !document.querySelector('#grid').disabled", "the stop")
    assert 1 <= page.script(f"return {CELLS}") < 36


MAP = "document.querySelector('#map canvas')"
LEGEND = "[...document.querySelectorAll('#map .values button')].map(one => one.innerText.replace(/\\s+/g, ' ').trim())"
HERE = "document.querySelector('#map .here')"
TIP = "document.querySelector('#map .tip')"
CARD = "(document.querySelector('#explore-card .text')?.innerText ?? '')"
COLOURED = (
    f"(() => {{ const all = {MAP}.getContext('2d').getImageData(0, 0, {MAP}.width, {MAP}.height).data;"
    "const seen = new Set(); for (let at = 0; at < all.length; at += 4) if (all[at + 3] > 200)"
    "seen.add(all.slice(at, at + 3).join()); return [...seen]; })()"
)


NEAR = "[...document.querySelectorAll('#explore-near .caption-label')].map(label => label.innerText)"


def _colour(page, by):
    page.script(
        "[...document.querySelectorAll('#map .by button')].find(one => one.innerText == arguments[0]).click()", by
    )


def _explore(page):
    _tab(page, "Explore")
    page.until(f"{MAP}?.dataset.count == {len(TEXTS)} && {COLOURED}.length", "the map", PATIENCE)


def test_the_map_takes_its_colours_from_style_or_language_and_shows_the_prompts_place(explorer):
    _write(explorer, "red b, flat style")
    _explore(explorer)
    assert explorer.script(f"return {LEGEND}") == ["blob 8", "flat 8", "noto 8"]
    before = explorer.script(f"return {COLOURED}")
    explorer.until(f"{HERE}?.offsetParent && {HERE}.innerText == 'your prompt'", "the prompt's place", PATIENCE)
    explorer.until(f"{NEAR}[0] == '1.00 · red b, flat style'", "its neighbours")
    _colour(explorer, "language")
    explorer.until(f"{LEGEND}.join() == 'de 12,en 12'", "the other legend")
    explorer.script("document.querySelector('#map .values button').click()")
    explorer.until(
        "document.querySelector('#map .values button').getAttribute('aria-pressed') == 'false'"
        f" && {COLOURED}.join() != {','.join(before)!r}",
        "the hidden language",
    )
    _write(explorer, "", "#explore-prompt textarea")
    explorer.until(f"{HERE}.hidden", "the place to go")


def test_a_german_prompt_lies_on_the_map_beside_what_means_the_same_in_other_languages(reference, window, screenshots):
    window.look(width=1280, height=900, dark=True)
    _open(window, reference.address)
    _write(window, "ein rotes Herz")
    _tab(window, "Explore")
    window.until(f"{MAP}?.dataset.count > 5000 && {HERE}.offsetParent", "the map", PATIENCE)
    _colour(window, "language")
    window.until(f"{LEGEND}.some(value => value.startsWith('de '))", "the languages")
    window.until(f"{NEAR}.length == 6", "its neighbours", PATIENCE)
    near = window.script(f"return {NEAR}.map(caption => caption.split(' · ')[1])")
    concepts = {row.text: row.metadata["concept"] for row in open_index().rows()}
    assert sum("heart" in concepts[text] for text in near) >= 4, near
    window.screenshot(screenshots / "explore.webp")
    _check_console(window)


def test_a_dot_tells_its_prompt_and_a_click_shows_its_picture_and_uses_it(explorer):
    _explore(explorer)
    text, (x, y) = _hovered(explorer)
    assert text in TEXTS
    for kind in ("mousePressed", "mouseReleased"):
        explorer.mouse(kind, x, y)
    explorer.until(f"{CARD} == {text!r}", "the card", PATIENCE)
    explorer.until("document.querySelector('#explore-picture img')?.naturalWidth == 16", "its picture")
    explorer.click("#explore-use")
    explorer.until(f"{PROMPT} == {text!r} && document.querySelector('#prompt').offsetParent", "the first tab")
    assert explorer.script(f"return {SEED}") == str(50 + TEXTS.index(text))


def _hovered(page):
    """Move the mouse over the map until a dot tells its text: that, and where."""
    left, top, width, height = page.script(
        f"{MAP}.scrollIntoView({{block: 'center'}}); const box = {MAP}.getBoundingClientRect();"
        "return [box.left, box.top, box.width, box.height]"
    )
    for y in range(10, int(height), 14):
        for x in range(10, int(width), 14):
            page.mouse("mouseMoved", left + x, top + y)
            if page.script(f"return {MAP}.classList.contains('over')"):
                page.until(f"!{TIP}.hidden", "what the dot says")
                return page.script(f"return {TIP}.querySelector('p').innerText"), (left + x, top + y)
    raise AssertionError("no dot was found")


def test_the_map_is_moved_zoomed_and_picked_from_by_keyboard_and_wheel(explorer):
    _explore(explorer)
    shot = f"return {MAP}.toDataURL()"
    seen = {explorer.script(shot)}
    for key in ("+", "\ue014", "-", "\ue013"):
        explorer.keys("#map canvas", key)
        explorer.until(lambda: explorer.script(shot) not in seen, f"what the key {key!r} does")
        seen.add(explorer.script(shot))
    x, y = explorer.script(f"const box = {MAP}.getBoundingClientRect(); return [box.left + 200, box.top + 200]")
    explorer.mouse("mouseWheel", x, y, deltaX=0, deltaY=-300)
    explorer.until(lambda: explorer.script(shot) not in seen, "what the wheel does")
    explorer.keys("#map canvas", ENTER)
    explorer.until(f"{CARD} != ''", "the prompt in the middle", PATIENCE)


def test_a_map_is_kept_over_a_reload(explorer, styled):
    _explore(explorer)
    (kept,) = Path(styled.options[1]).glob("served/maps/*.npy")
    was = kept.stat().st_mtime_ns
    explorer.script("location.reload()")
    explorer.until(f"{FOUND}.length >= {len(PROMPTS)}", "the first prompts", PATIENCE)
    _explore(explorer)
    assert [kept.stat().st_mtime_ns] == [one.stat().st_mtime_ns for one in kept.parent.iterdir()] == [was]
    _check_console(explorer)


def test_neighbours_are_blended_in_and_the_same_seed_without_them_is_one_click_away(page):
    _unfold(page, "#retrieval", "#neighbours label")
    _choose(page, "#neighbours", "blend in")
    _write(page, "fox")
    _draw(page)
    page.until("document.querySelectorAll('#used li').length", "the neighbours")
    page.click("#without")
    page.until("document.querySelectorAll('#with-without img').length == 2", "the two pictures", PATIENCE)
    page.until(READY, "the end")
    page.until(lambda: len({tuple(box) for box in _laid("#with-without", page)}) == 1, "them to lie on each other")


def test_a_pipeline_is_loaded_and_told_and_a_wrong_one_is_explained(page, demo):
    _tab(page, "Models")
    page.until("document.querySelector('#contracts').innerText.includes('32-wide tokens')", "the contract", PATIENCE)
    _write(page, "/nothing/here/at/all", "#pipeline textarea, #pipeline input")
    page.click("#load")
    page.until("document.querySelector('#load-status').innerText.includes('no pipeline folder')", "the reason")
    _write(page, demo.pipeline, "#pipeline textarea, #pipeline input")
    page.until("!document.querySelector('#load').disabled", "the button")
    page.click("#load")
    page.until("document.querySelector('#load-status').innerText.includes('Loaded')", "the pipeline", PATIENCE)
    assert "cpu" in page.script("return document.querySelector('#present').innerText")
    _tab(page, "Draw & find")
    _draw(page)


def test_a_wrong_encoder_is_explained_and_the_page_lives_on(page, demo):
    page.keys("#encoder input", f"{CTRL}a{RELEASE}{demo.wide}{ENTER}")
    page.until(f"{HEAD}.includes('48-wide')", "the reason", PATIENCE)
    page.click("#generate")
    page.until("document.querySelector('.toast-body')?.innerText.includes('48-wide')", "the error", PATIENCE)
    page.until(READY, "the buttons")
    page.script("document.querySelector('.toast-close').click()")
    page.keys("#encoder input", f"{CTRL}a{RELEASE}native{ENTER}")
    page.until(f"{FOUND}.length >= {len(PROMPTS)}", "the prompts", PATIENCE)
    _draw(page)


@pytest.mark.parametrize("text", ["", "🍎🦊", "ثعلب أحمر", "fox " * 10_000], ids=["empty", "emoji", "arabic", "long"])
def test_any_prompt_leaves_a_living_page(page, text):
    page.script(
        "const box = document.querySelector('#prompt textarea'); box.value = arguments[0];"
        "box.dispatchEvent(new Event('input', {bubbles: true}))",
        text,
    )
    _draw(page)
    cut = page.until(
        f"(document.querySelector('#count .cut') !== null) == {str(len(text) > 100).lower()} || null", "the notice"
    )
    assert cut


def test_two_people_at_once_wait_for_each_other_and_see_their_own(page, server, tmp_path):
    other = browser.Browser(tmp_path)
    try:
        other.look(width=1280, height=900)
        _open(other, server.address)
        _number(page, "#steps", 60)
        _unfold(page, "#more", "#pictures input")
        _number(page, "#pictures", 8)
        page.click("#generate")
        page.until(f"{STATUS}.includes('Step')", "the first step", PATIENCE)
        _write(other, "blue apple")
        other.click("#generate")
        other.until(f"{STATUS}.includes('before you')", "the place in the line", PATIENCE)
        page.click("#stop")
        page.until(f"{STATUS}.includes('Stopped')", "the stop")
        _drawn(other)
        assert other.script(f"return {MADE}") == 1
        assert other.script("return document.querySelector('#made .caption-label').innerText").startswith("blue apple")
    finally:
        other.close()


def test_the_page_survives_the_death_of_the_server(demo, window, tmp_path):
    server = Server(tmp_path, *_options(demo), "--port", str(browser.free_port()))
    window.look(width=1280, height=900)
    _open(window, server.address)
    _write(window, "red fox")
    _draw(window)
    window.click("#made .star")
    window.until(f"{STARS}.join() == 'true'", "the favourite")
    server.kill()
    server.start()
    window.script("location.reload()")
    window.until(f"{MADE} == 1 && {PROMPT} == 'red fox'", "what was made before", PATIENCE)
    window.until(f"{FOUND}.length > 0", "the prompts", PATIENCE)
    assert window.script(f"return {STARS}") == [True]
    _draw(window)
    assert window.script(f"return {MADE}") == 2
    server.close()
    window.log("browser")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 768, 1280])
def test_nothing_sticks_out_of_the_page(reference, window, screenshots, width, dark):
    window.look(width=width, height=844, dark=dark)
    _open(window, reference.address)
    assert window.script("return document.body.classList.contains('dark')") == dark
    _write(window, "red apple, blob style" if dark else "red apple, noto style")
    _number(window, "#seed", 7)
    window.click("#reuse")
    window.until("!document.querySelector('#random input').checked", "the choice")
    _draw(window)
    window.until(f"{HEAD}.includes('by the same encoder')", "the neighbours", PATIENCE)
    if name := {(1280, False): "desktop", (1280, True): "dark", (390, False): "phone"}.get((width, dark)):
        window.screenshot(screenshots / f"{name}.webp")
    for title in window.script(f"return [...{TABS}].map(tab => tab.textContent.trim())"):
        _tab(window, title)
        if title == "Explore":
            window.until(f"{MAP}?.dataset.count && {HERE}.offsetParent", "the map", PATIENCE)
        assert window.script("return document.documentElement.scrollWidth") <= width
    _check_console(window)
