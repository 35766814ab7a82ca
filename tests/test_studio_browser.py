"""The studio in a real headless Chromium. Its screenshots stay in pytest's temporary folder (see --basetemp)."""

import signal
import subprocess
import sys

import browser
import pytest
from tiny_reference import PROMPTS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (browser.CHROMIUM and browser.DRIVER),
        reason="needs chromium and chromedriver (apt install chromium-driver)",
    ),
]

PROMPT = "document.querySelector('#prompt textarea').value"
PICTURE = "document.querySelector('#picture img')?.naturalWidth"
STATUS = "document.querySelector('#status').innerText"
FOUND = "[...document.querySelectorAll('#found .caption-label')].map(label => label.innerText)"
READY = "!document.querySelector('#generate').disabled"


@pytest.fixture(scope="module")
def studio(demo):
    """Address of `textcond studio` as a person starts it."""
    command = [sys.executable, "-m", "textcond.apps.cli", "studio", "--pipeline", demo.pipeline, "--index", demo.index]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    address = server.stdout.readline().split()[2]
    yield address
    server.send_signal(signal.SIGINT)
    _, err = server.communicate(timeout=60)
    assert server.returncode == 130
    assert "Traceback" not in err


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    opened = browser.Browser(tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()


@pytest.fixture
def page(studio, window):
    window.log("browser")
    window.look(width=1280, height=900)
    window.open("about:blank")
    window.requests()
    window.open(studio)
    window.until(f"{FOUND}.length == {len(PROMPTS)}", "the first prompts")
    return window


def _write(page, text):
    page.keys("#prompt textarea", "\ue009a\ue000" + (text or "\ue003"))  # Ctrl+A, and Delete for nothing


def _draw(page):
    page.click("#generate")
    page.until(f"{STATUS}.includes('seed') && {READY}", "the picture")


def test_a_prompt_is_found_used_drawn_and_brought_back(page, studio):
    _write(page, "red fox, noto style")
    page.until(f"{FOUND}[0] == '1.00 · red fox, noto style'", "the nearest prompt")
    third = page.script(f"return {FOUND}[2]").split(" · ")[1]
    page.click("#found .gallery-item:nth-child(3) button")
    page.until(f"{PROMPT} == {third!r}", "the clicked prompt")
    _draw(page)
    assert page.until(PICTURE, "the picture to load") == 128
    first = page.script(f"return {STATUS}")
    _write(page, "blue apple")
    page.keys("#prompt textarea", "\ue007")
    page.until("document.querySelectorAll('#made .gallery-item').length == 2", "a second picture")
    page.until(READY, "the end of the drawing")
    page.click("#made .gallery-item:nth-child(2) button")
    page.until(f"{PROMPT} == {third!r}", "the earlier prompt")
    seed = page.script("return document.querySelector('#seed input').value")
    assert f"seed {seed} " in first
    assert not page.script("return document.querySelector('#random input').checked")
    outside = {url for url in page.requests() if not url.startswith((studio, "data:", "blob:", "chrome:", "about:"))}
    assert not outside
    assert not [entry for entry in page.log("browser") if entry["level"] == "SEVERE"]


def test_surprise_me_draws_one_of_the_prompts(page):
    page.click("#surprise")
    page.until(f"{STATUS}.includes('seed') && {READY}", "the picture")
    assert page.script(f"return {PROMPT}") in PROMPTS


def test_stop_stops_and_the_next_picture_comes(page):
    page.keys("#steps input[type=number]", "\ue009a\ue00060\ue004")
    page.click("#generate")
    page.until(f"{STATUS}.includes('Step')", "the first step")
    page.click("#stop")
    page.until(f"{STATUS}.includes('Stopped') && {READY}", "the stop")
    assert not page.script("return document.querySelectorAll('#made .gallery-item').length")
    page.keys("#steps input[type=number]", "\ue009a\ue0002\ue004")
    _draw(page)


def test_a_wrong_encoder_is_explained_and_the_page_lives_on(page, demo):
    page.keys("#encoder input", f"\ue009a\ue000{demo.wide}\ue007")
    page.until("document.querySelector('#found-head').innerText.includes('48-wide')", "the reason")
    page.click("#generate")
    page.until("document.querySelector('.toast-body')?.innerText.includes('48-wide')", "the error")
    page.until(READY, "the buttons")
    page.script("document.querySelector('.toast-close').click()")
    page.keys("#encoder input", "\ue009a\ue000native\ue007")
    page.until(f"{FOUND}.length == {len(PROMPTS)}", "the prompts")
    _draw(page)


@pytest.mark.parametrize("text", ["", "🍎🦊", "ثعلب أحمر", "fox " * 300], ids=["empty", "emoji", "arabic", "long"])
def test_any_prompt_leaves_a_living_page(page, text):
    page.script(
        "const box = document.querySelector('#prompt textarea'); box.value = arguments[0];"
        "box.dispatchEvent(new Event('input', {bubbles: true}))",
        text,
    )
    _draw(page)
    cut = page.script("return document.querySelector('#count .cut') !== null")
    assert cut == (len(text) > 100)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 768, 1280])
def test_nothing_sticks_out_of_the_page(page, studio, tmp_path, width, dark):
    page.look(width=width, height=844, dark=dark)
    page.open(studio)
    page.until(f"{FOUND}.length == {len(PROMPTS)}", "the first prompts")
    assert page.script("return document.documentElement.scrollWidth") <= width
    assert page.script("return document.body.classList.contains('dark')") == dark
    _draw(page)
    page.screenshot(tmp_path / f"studio-{width}-{'dark' if dark else 'light'}.png")
