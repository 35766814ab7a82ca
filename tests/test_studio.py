import json
import shutil
import socket
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_reference import PROMPTS

from textcond.apps.engine import Engine
from textcond.apps.metadata import NATIVE, Parameters, read_parameters
from textcond.apps.studio import (
    FIRST_PORT,
    Made,
    Step,
    Stopped,
    build,
    drawing,
    free_port,
    nearby_encoders,
    serve,
    thumbnail,
)


@pytest.fixture(scope="module")
def engine(demo):
    return Engine(demo.pipeline, demo.index)


def _parameters(engine, steps=4, encoder=NATIVE):
    return Parameters("a red fox!", seed=7, num_inference_steps=steps, pipeline=engine.name, encoder=encoder)


def test_a_drawing_tells_its_steps_and_ends_with_a_picture_that_can_be_made_again(engine, tmp_path):
    *steps, made = drawing(engine, _parameters(engine), tmp_path, threading.Event())
    assert [(step.done, step.total) for step in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [step.done for step in steps if step.preview] == [2]
    assert Image.open(steps[1].preview).size == (128, 128)
    assert isinstance(made, Made)
    assert made.path.name == "a-red-fox-7.png"
    assert read_parameters(made.path) == made.parameters
    image, _ = engine.draw(made.parameters)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(made.path)))


def test_a_drawing_stops_soon_after_it_is_told_to(engine, tmp_path):
    stop = threading.Event()
    steps = drawing(engine, _parameters(engine, steps=1000), tmp_path, stop)
    assert isinstance(next(steps), Step)
    stop.set()
    with pytest.raises(Stopped):
        list(steps)
    assert isinstance(list(drawing(engine, _parameters(engine), tmp_path, threading.Event()))[-1], Made)


def test_a_page_that_goes_away_stops_its_drawing(engine, tmp_path):
    stop = threading.Event()
    steps = drawing(engine, _parameters(engine, steps=1000), tmp_path, stop)
    next(steps)
    steps.close()
    assert stop.is_set()


def test_an_error_of_the_drawing_reaches_who_waits(engine, demo, tmp_path):
    with pytest.raises(ValueError, match="48-wide"):
        list(drawing(engine, _parameters(engine, encoder=demo.wide), tmp_path, threading.Event()))


def test_a_thumbnail_is_written_once(engine, tmp_path):
    (hit,) = engine.finder().search("red fox", 1)
    path = thumbnail(hit, tmp_path)
    assert Image.open(path).getpixel((0, 0)) == hit.image.getpixel((0, 0))
    was = path.stat().st_mtime_ns
    assert thumbnail(hit, tmp_path) == path
    assert path.stat().st_mtime_ns == was
    assert len(list(tmp_path.iterdir())) == 1


def test_encoders_nearby_are_found_and_other_folders_are_not(demo, tmp_path):
    shutil.copytree(demo.encoder, tmp_path / "mine")
    shutil.copytree(demo.encoder, tmp_path / "runs" / "other")
    shutil.copytree(f"{demo.pipeline}/text_encoder", tmp_path / "stock")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_bytes(b"\xff")
    assert nearby_encoders(tmp_path) == ["mine", "runs/other"]


def test_the_first_free_port_is_taken():
    with socket.socket() as taken:
        try:
            taken.bind(("127.0.0.1", FIRST_PORT))
            taken.listen()
        except OSError:
            pass  # somebody else has it, which is as good
        assert free_port("127.0.0.1") > FIRST_PORT


def test_a_port_or_address_that_cannot_be_had_is_named(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} on 127.0.0.1 is taken: pass another --port"):
            free_port("127.0.0.1", port)
        monkeypatch.setattr("textcond.apps.studio.FIRST_PORT", port)
        monkeypatch.setattr("textcond.apps.studio.LAST_PORT", port)
        with pytest.raises(OSError, match=f"no port of {port} to {port} on 127.0.0.1 is free"):
            free_port("127.0.0.1")
    with pytest.raises(OSError, match=r"pass --host 127\.0\.0\.1"):
        free_port("192.0.2.1", 7860)
    with pytest.raises(OSError, match="no address of this machine"):
        free_port("no such host", 7860)


def test_a_pipeline_or_index_that_is_not_there_is_told_before_anything_is_served(demo):
    with pytest.raises(FileNotFoundError, match="there is no pipeline folder"):
        serve(pipeline=f"{demo.root}/none/at/all")
    with pytest.raises(FileNotFoundError, match="there is no prompt index"):
        serve(pipeline=demo.pipeline, index=f"{demo.root}/none")


class Page:
    """The served page as a browser uses it: events go in by name, the values of the outputs come back."""

    def __init__(self, url: str):
        self.url = url
        self.config = self._read("config")
        self.events = {event["api_name"]: event for event in self.config["dependencies"]}

    def _read(self, path, data=None):
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def fire(self, name, *inputs, session="one", event_data=None):
        """Fire an event and return the messages of its run, the last of them its end."""
        join = {"data": inputs, "fn_index": self.events[name]["id"], "session_hash": session, "event_data": event_data}
        self._read("gradio_api/queue/join", join)
        messages = []
        with urllib.request.urlopen(f"{self.url}gradio_api/queue/data?session_hash={session}", timeout=60) as stream:
            for line in stream:
                if line.startswith(b"data: "):
                    messages.append(json.loads(line[6:]))
                    if messages[-1]["msg"] == "process_completed":
                        return messages
        raise AssertionError(f"{name} did not end: {messages}")

    def call(self, name, *inputs, session="one"):
        """Fire an event that does not wait in the queue."""
        data = {"data": inputs, "fn_index": self.events[name]["id"], "session_hash": session}
        return self._read("gradio_api/run/predict", data)["data"]


@pytest.fixture(scope="module")
def page(engine, demo, tmp_path_factory):
    built = build(engine, tmp_path_factory.mktemp("studio"), encoders=[demo.encoder], typed_encoders=False)
    _, url, _ = built.queue().launch(prevent_thread_lock=True, quiet=True, footer_links=[], run_history=False)
    yield Page(url)
    built.close(verbose=False)


def _texts(messages):
    """Captions that the gallery of an answer shows."""
    return [item["caption"] for item in _output(messages)[0]]


def _output(messages):
    assert messages[-1]["success"], messages[-1]
    return messages[-1]["output"]["data"]


def test_the_nearest_prompts_come_with_scores_and_pictures(page):
    gallery, _, head, count = _output(page.fire("find", "red fox, noto style", NATIVE))
    assert gallery[0]["caption"] == "1.00 · red fox, noto style"
    assert len(gallery) == len(PROMPTS)
    assert f"of {len(PROMPTS)}" in head
    assert "of 30 tokens" in count
    with urllib.request.urlopen(gallery[0]["image"]["url"]) as answer:
        assert answer.headers["Content-Type"] == "image/png"


def test_an_empty_prompt_shows_prompts_to_begin_with(page):
    assert sorted(_texts(page.fire("find", " ", NATIVE))) == sorted(PROMPTS)


def test_another_encoder_finds_by_its_own_vectors(page, engine, demo):
    found = _texts(page.fire("find", "blue fox", demo.encoder))
    assert found == [f"{hit.score:.2f} · {hit.text}" for hit in engine.finder(demo.encoder).search("blue fox", 12)]


def test_an_overlong_prompt_is_told_where_it_is_cut(page):
    *_, count = _output(page.fire("find", "<b>" + "fox " * 10_000, NATIVE))
    assert "30,003 of 30 tokens" in count
    assert "stops reading after" in count
    assert "<b>" not in count


@pytest.mark.parametrize("text", ["", "🍎🦊", "ثعلب أحمر", "fox " * 10_000], ids=["empty", "emoji", "arabic", "long"])
def test_any_prompt_is_drawn(page, text):
    picture, seed, status, _, head, history = _output(page.fire("run", text, "", 5, False, 2, 3.0, NATIVE, None))
    assert seed == 5
    assert "seed 5 · 2 steps · guidance 3 · 128×128" in status
    assert "Made in this session" in head
    assert history["value"][0]["caption"] == (text or "(empty prompt)")
    made = read_parameters(picture["path"])
    assert (made.prompt, made.seed, made.num_inference_steps) == (text, 5, 2)


def test_a_random_seed_is_shown(page):
    seeds = {_output(page.fire("run", "fox", "", 5, True, 1, 3.0, NATIVE, None))[1] for _ in range(2)}
    assert len(seeds) == 2
    assert 5 not in seeds


def test_what_cannot_be_drawn_is_said_in_words_and_the_next_one_is_drawn(page, engine, monkeypatch):
    def fail(*arguments):
        raise ValueError("the text encoder gives 48-wide tokens")

    with monkeypatch.context() as broken:
        broken.setattr(engine, "draw", fail)
        end = page.fire("run", "fox", "", 5, False, 2, 3.0, NATIVE, None)[-1]
    assert not end["success"]
    assert end["output"]["error"] == "the text encoder gives 48-wide tokens"
    _output(page.fire("run", "fox", "", 5, False, 2, 3.0, NATIVE, None))


def test_what_cannot_be_searched_is_said_beside_the_gallery(page, engine, monkeypatch):
    def fail(encoder):
        raise ValueError("there is no <index>")

    monkeypatch.setattr(engine, "finder", fail)
    gallery, _, head, _ = _output(page.fire("find", "fox", NATIVE))
    assert gallery == []
    assert "there is no &lt;index&gt;" in head


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["fox", "", 5, False, 2000, 3.0, NATIVE, None], "2000"),
        (["fox", "", 5, False, 2, 99.0, NATIVE, None], "99"),
        (["fox", "", -1, False, 2, 3.0, NATIVE, None], "-1"),
        (["fox", "", 5, False, 2, 3.0, "/etc", None], "/etc"),
    ],
    ids=["steps", "guidance", "seed", "encoder"],
)
def test_values_beyond_the_controls_are_refused_by_the_server(page, inputs, message):
    end = page.fire("run", *inputs)[-1]
    assert not end["success"]
    assert message in end["output"]["error"]


def test_stop_ends_a_drawing_that_runs(page):
    inputs = ["fox", "", 5, False, 60, 3.0, NATIVE, None]
    page.fire("lock", session="two")
    ended = []
    thread = threading.Thread(target=lambda: ended.append(page.fire("run", *inputs, session="two")))
    thread.start()
    while thread.is_alive():
        page.call("halt", session="two")
        thread.join(0.2)
    assert "Stopped." in json.dumps(ended[0])
    assert "seed 5" not in json.dumps(ended[0])


def test_a_click_on_a_found_prompt_puts_it_into_the_prompt(page):
    found = _texts(page.fire("find", "red fox", NATIVE, session="three"))
    (text,) = _output(page.fire("use", None, session="three", event_data={"index": 2, "value": None}))
    assert found[2].endswith(f" · {text}")


def test_a_click_on_an_earlier_picture_brings_back_what_made_it(page):
    page.fire("run", "a fox", "snow", 5, False, 2, 3.0, NATIVE, None, session="four")
    page.fire("run", "a cat", "", 6, False, 1, 4.0, NATIVE, None, session="four")
    event = {"index": 1, "value": None}
    picture, *controls, status = _output(page.fire("restore", None, session="four", event_data=event))
    assert controls == ["a fox", "snow", 5, False, 2, 3.0, NATIVE]
    assert read_parameters(picture["path"]).prompt == "a fox"
    assert "seed 5" in status


def test_no_file_outside_the_studio_is_served(page, demo):
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{page.url}gradio_api/file={Path(demo.pipeline) / 'model_index.json'}")
