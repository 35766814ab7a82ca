import json
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from studio_page import SETTINGS, Page
from tiny_reference import PROMPTS

from textcond.apps.engine import Engine
from textcond.apps.metadata import MULTILINGUAL, NATIVE, Parameters, read_parameters, write_png
from textcond.apps.studio import Studio, build, serve
from textcond.apps.studio.find import thumbnail
from textcond.apps.studio.generate import sayable, unsaid
from textcond.apps.studio.links import link
from textcond.apps.studio.server import FIRST_PORT, _middleware, free_port, nearby_encoders, pictures_folder


@pytest.fixture(scope="module")
def engine(demo):
    return Engine(demo.pipeline, demo.index)


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
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of before may be closing
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
        monkeypatch.setattr("textcond.apps.studio.server.FIRST_PORT", port)
        monkeypatch.setattr("textcond.apps.studio.server.LAST_PORT", port)
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


@pytest.mark.parametrize("auth", ["me", "me:", ":secret"])
def test_a_malformed_password_is_told_before_anything_is_served(demo, tmp_path, auth):
    with pytest.raises(ValueError, match="NAME:PASSWORD"):
        serve(pipeline=demo.pipeline, index=demo.index, pictures=tmp_path, auth=auth)


def test_pictures_are_kept_in_the_users_cache_or_where_they_are_wanted(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert pictures_folder() == tmp_path / "textcond" / "studio"
    assert pictures_folder(tmp_path / "mine") == tmp_path / "mine"
    assert (tmp_path / "mine" / "served").is_dir()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("studio")


def _launched(studio, middleware=()):
    built = build(studio)
    _, url, _ = built.queue(default_concurrency_limit=4).launch(
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        run_history=False,
        app_kwargs={"middleware": list(middleware)},
    )
    return built, url


@pytest.fixture(scope="module")
def studio(engine, demo, folder):
    return Studio(engine, folder, encoders=[demo.encoder])


@pytest.fixture(scope="module")
def page(studio):
    built, url = _launched(studio)
    yield Page(url)
    built.close(verbose=False)


def _run(page, *, session="one", token="", random=False, count=1, **changed):
    """Press Generate; what comes back by component."""
    inputs = [token, random, count, None, *(SETTINGS | changed).values()]
    return page.fire("run", *inputs, session=session)


def _shown(page, name, messages):
    """The values that the end of an event gives, by the elem_id of the component."""
    assert messages[-1]["success"], messages[-1]
    return _named(page, name, messages[-1]["output"]["data"])


def _named(page, name, values):
    ids = page.events[name]["outputs"]
    names = {one["id"]: one["props"].get("elem_id") or one["type"] for one in page.config["components"]}
    return {names[number]: value for number, value in zip(ids, values)}


def _changed(value):
    return value if isinstance(value, dict) and value.get("__type__") == "update" else {"value": value}


def _captions(gallery):
    return [item["caption"] for item in _changed(gallery)["value"]]


def _find(page, text, encoder=NATIVE, mode="dense", session="one"):
    return _shown(page, "find", page.fire("find", text, encoder, mode, session=session))


def test_the_nearest_prompts_come_with_scores_and_pictures(page):
    shown = _find(page, "red fox, noto style")
    tiles = _changed(shown["found"])["value"]
    assert tiles[0]["caption"] == "1.00 · red fox, noto style"
    assert len(tiles) == len(PROMPTS)
    assert f"of {len(PROMPTS)}" in shown["found-head"]
    assert "of 30 tokens" in shown["count"]
    with urllib.request.urlopen(tiles[0]["image"]["url"]) as answer:
        assert answer.headers["Content-Type"] == "image/png"


def test_the_order_may_be_by_words_or_by_both(page):
    assert _captions(_find(page, "blob fox", mode="lexical")["found"])[0].endswith("fox, blob style")
    first = _captions(_find(page, "red fox, noto style", mode="hybrid")["found"])[0]
    assert first == "red fox, noto style"


def test_an_empty_prompt_shows_prompts_to_begin_with(page):
    assert sorted(_captions(_find(page, " ")["found"])) == sorted(PROMPTS)


def test_another_encoder_finds_by_its_own_vectors(page, engine, demo):
    found = _captions(_find(page, "blue fox", demo.encoder)["found"])
    assert found == [f"{hit.score:.2f} · {hit.text}" for hit in engine.finder(demo.encoder).search("blue fox", 12)]


def test_an_overlong_prompt_is_told_where_it_is_cut(page):
    count = _find(page, "<b>" + "fox " * 10_000)["count"]
    assert "30,003 of 30 tokens" in count
    assert "stops reading after" in count
    assert "<b>" not in count


@pytest.mark.parametrize("text", ["", "🍎🦊", "ثعلب أحمر", "fox " * 10_000], ids=["empty", "emoji", "arabic", "long"])
def test_any_prompt_is_drawn(page, text):
    shown = _shown(page, "run", _run(page, prompt=text))
    assert shown["seed"] == 5
    assert "seed 5 · 2 steps · guidance 3 · 128×128" in shown["status"]
    assert _captions(shown["made"])[0] == f"{text or '(empty prompt)'} · 5"
    made = read_parameters(shown["picture"]["path"])
    assert (made.prompt, made.seed, made.num_inference_steps) == (text, 5, 2)
    assert shown["address"] == link(made)
    assert "manual_seed(5)" in shown["code"]


def test_size_sampler_and_number_are_as_asked(page):
    messages = _run(page, count=3, width=64, height=96, scheduler="EulerDiscreteScheduler")
    shown = _shown(page, "run", messages)
    made = read_parameters(shown["picture"]["path"])
    assert (made.width, made.height, made.seed, made.scheduler) == (64, 96, 7, "EulerDiscreteScheduler")
    assert len(_captions(shown["made"])) >= 3
    assert "Picture 2 of 3" in json.dumps(messages)


def test_a_random_seed_is_shown(page):
    seeds = {_shown(page, "run", _run(page, random=True))["seed"] for _ in range(2)}
    assert len(seeds) == 2
    assert 5 not in seeds


def test_what_cannot_be_drawn_is_said_in_words_and_the_next_one_is_drawn(page, engine, monkeypatch):
    def fail(*arguments):
        raise ValueError("the text encoder gives 48-wide tokens")

    with monkeypatch.context() as broken:
        broken.setattr(engine, "draw", fail)
        end = _run(page)[-1]
    assert not end["success"]
    assert end["output"]["error"] == "the text encoder gives 48-wide tokens"
    _shown(page, "run", _run(page))


def test_what_cannot_be_searched_is_said_beside_the_gallery(page, engine, monkeypatch):
    def fail(encoder):
        raise ValueError("there is no <index>")

    monkeypatch.setattr(engine, "finder", fail)
    shown = _find(page, "fox")
    assert shown["found"] == []
    assert "there is no &lt;index&gt;" in shown["found-head"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 2000}, "2000"),
        ({"guidance": 99.0}, "99"),
        ({"seed": -1}, "-1"),
        ({"encoder": "/etc"}, "/etc"),
        ({"width": 100_000}, "100000"),
        ({"height": 8}, "height 8 is too small"),
        ({"count": 500}, "500"),
        ({"scheduler": "os.system"}, "os.system"),
    ],
    ids=["steps", "guidance", "seed", "encoder", "large", "small", "count", "sampler"],
)
def test_values_beyond_the_controls_are_refused_by_the_server(page, changed, message):
    end = _run(page, **changed)[-1]
    assert not end["success"]
    assert message in end["output"]["error"]


def test_stop_ends_a_drawing_that_runs(page):
    page.call("lock", session="two")
    ended = []
    thread = threading.Thread(target=lambda: ended.append(_run(page, steps=60, session="two")))
    thread.start()
    while thread.is_alive():
        page.call("halt", session="two")
        thread.join(0.2)
    assert "Stopped." in json.dumps(ended[0])
    assert "seed 5" not in json.dumps(ended[0])


def _click(page, session, index, how, text=""):
    event = {"index": index, "value": None}
    return _shown(page, "click", page.fire("click", None, how, text, NATIVE, session=session, event_data=event))


def test_a_click_uses_or_appends_a_found_prompt_or_finds_what_is_like_it(page):
    found = [text.split(" · ")[1] for text in _captions(_find(page, "red fox", session="three")["found"])]
    assert _click(page, "three", 2, "use")["prompt"] == found[2]
    assert _click(page, "three", 2, "append", "an owl")["prompt"].startswith("an owl, ")
    similar = _click(page, "three", 2, "similar")
    assert "Similar to" in similar["found-head"]
    assert found[2] not in [caption.split(" · ")[1] for caption in _captions(similar["found"])]


def _opened(page, token, address, session):
    return _named(page, "opened", page.call("opened", token, address, session=session))


def test_what_another_visitor_made_is_not_seen(page):
    token = _shown(page, "run", _run(page, session="four"))["browserstate"]
    opened = _opened(page, token, "", "four")
    assert _captions(opened["made"]) == ["fox · 5"]
    assert _captions(_opened(page, "", "", "five")["made"]) == []
    assert _opened(page, "../..", "", "five")["browserstate"] != "../.."


def test_the_address_of_a_picture_tells_nobody_the_way_to_the_others(page, client):
    address = _shown(page, "run", _run(page, session="four"))["picture"]["path"]
    drawn = client.predict("a fox", steps=1, api_name="/generate")
    for folder in (*Path(address).parts, *Path(drawn).parts, "0" * 32):
        assert _captions(_opened(page, folder, "", "five")["made"]) == []


def test_a_click_on_an_earlier_picture_brings_back_what_made_it(page):
    token = _shown(page, "run", _run(page, session="six", prompt="a fox", negative="snow"))["browserstate"]
    _run(page, session="six", token=token, prompt="a cat", seed=6)
    event = {"index": 1, "value": None}
    shown = _shown(page, "restore", page.fire("restore", None, session="six", event_data=event))
    assert [shown[name] for name in ("prompt", "negative", "seed", "random", "steps")] == ["a fox", "snow", 5, False, 2]
    assert read_parameters(shown["picture"]["path"]).prompt == "a fox"
    assert "seed 5" in shown["status"]


def test_a_link_fills_the_page_and_a_broken_one_is_told(page, demo):
    parameters = Parameters("a fox", seed=9, num_inference_steps=3, guidance_scale=2.0, encoder=demo.encoder)
    shown = _opened(page, "", link(parameters), "seven")
    assert (shown["prompt"], shown["seed"], _changed(shown["encoder"])["value"]) == ("a fox", 9, demo.encoder)
    foreign = link(Parameters("a fox", encoder="/etc"))
    assert _changed(_opened(page, "", foreign, "seven")["encoder"])["value"] == NATIVE
    broken = _opened(page, "", "seed=x", "seven")
    assert "seed=x" in broken["status"]


def test_no_file_outside_the_studio_is_served(page, demo):
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{page.url}gradio_api/file={Path(demo.pipeline) / 'model_index.json'}")


@pytest.fixture(scope="module")
def client(page):
    gradio_client = pytest.importorskip("gradio_client")
    return gradio_client.Client(page.url, verbose=False)


def test_the_api_draws_what_the_page_draws(client, engine):
    path = client.predict("a fox", seed=3, steps=2, guidance=3.0, api_name="/generate")
    made = read_parameters(path)
    assert (made.prompt, made.seed, made.guidance_scale) == ("a fox", 3, 3.0)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(engine.draw(made)[0]))


def test_the_api_searches_and_embeds(client):
    rows = client.predict("red fox, noto style", k=2, api_name="/search")
    assert rows[0]["text"] == "red fox, noto style"
    assert set(rows[0]) == {"id", "score", "text", "metadata"}
    one, other = np.asarray(client.predict(["red fox", "blue apple"], api_name="/embed"))
    assert np.linalg.norm(one) == pytest.approx(1, abs=1e-5)
    assert one @ other < 0.999


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("/generate", {"prompt": "fox", "steps": 5000}, "steps is 5000"),
        ("/generate", {"prompt": "fox", "width": 10_000}, "width is 10000"),
        ("/generate", {"prompt": "fox", "encoder": "/etc"}, "not offered"),
        ("/generate", {"prompt": "fox", "steps": 2.5}, "steps is 2.5: pass a whole number from 1 to 60"),
        ("/generate", {"prompt": "fox", "seed": 2**63}, "seed is 9223372036854775808"),
        ("/generate", {"prompt": "fox", "strength": 7}, "strength is 7"),
        ("/generate", {"prompt": "fox", "width": 70}, "divisible by 8"),
        ("/generate", {"prompt": "fox", "scheduler": "foo"}, "scheduler 'foo' cannot drive this pipeline"),
        ("/generate", {"prompt": None}, "prompt is None: pass a text"),
        ("/search", {"query": " "}, "empty"),
        ("/search", {"query": "fox", "mode": "foo"}, "mode 'foo' is unknown"),
        ("/search", {"query": "fox", "k": 2.5}, "k is 2.5"),
        ("/embed", {"texts": ["fox"] * 1000}, "number of texts"),
        ("/embed", {"texts": "fox"}, "texts is 'fox': pass a list"),
        ("/embed", {"texts": [3]}, "a text is 3"),
    ],
)
def test_the_api_keeps_the_limits(client, name, inputs, message):
    with pytest.raises(Exception, match=message):
        client.predict(**inputs, api_name=name)


def test_a_picture_that_nobody_waits_for_any_more_leaves_the_line(page, client, studio):
    job = client.submit("a fox", steps=60, api_name="/generate")
    _until(lambda: studio.line.places)
    job.cancel()
    _until(lambda: not studio.line.places)


def test_who_finds_does_not_wait_for_those_who_draw(client, studio):
    jobs = [client.submit("a fox", steps=60, api_name="/generate") for _ in range(12)]
    _until(lambda: len(studio.line.places) == len(jobs))
    assert client.submit("red fox", api_name="/search").result(timeout=20)
    assert studio.line.places
    for job in jobs:
        job.cancel()
    _until(lambda: not studio.line.places)


def test_stop_ends_all_that_a_tab_began_and_nothing_of_another(studio):
    studio.prepare("one")
    with studio.stoppable("one") as first, studio.stoppable("grid-one") as grid:
        studio.prepare("one")  # a second wish while the first is drawn
        with studio.stoppable("one") as second:
            assert studio.busy("one")
            studio.stop("one")
            assert first.is_set()
            assert second.is_set()
            assert not grid.is_set()
            assert not studio.busy("one")
            studio.prepare("one")
            with studio.stoppable("one") as third:
                assert not third.is_set()
    studio.prepare("two")
    studio.stop("two")  # before it began
    with studio.stoppable("two") as early:
        assert early.is_set()


def test_what_a_dropped_picture_says_is_text_and_what_changes_is_told(page, studio, tmp_path):
    foreign = Parameters(
        "fox", seed=156680208700286, num_inference_steps=1000, guidance_scale=0.5, width=2048, height=2048,
        scheduler="DPM++ 2M Karras", encoder="/etc", pipeline="<img src=q onerror=alert(1)>",
    )  # fmt: skip
    write_png(tmp_path / "foreign.png", Image.new("RGB", (8, 8)), foreign)
    with open(tmp_path / "foreign.png", "rb") as file:
        answer = httpx.post(f"{page.url}gradio_api/upload", files={"files": file})
    data = {"path": answer.json()[0], "meta": {"_type": "gradio.FileData"}}
    shown = _shown(page, "open_picture", page.fire("open_picture", data, NATIVE, session="eight"))
    assert "<img" not in shown["status"]
    assert "steps 1000 to 60, guidance 0.5 to 1.0" in shown["status"]
    assert (shown["seed"], shown["steps"], shown["guidance"], shown["width"]) == (156680208700286, 60, 1.0, 1024)
    assert shown["scheduler"] == "DPMSolverMultistepScheduler"
    assert sayable(replace(foreign, scheduler="Euler a"), studio).scheduler == "EulerAncestralDiscreteScheduler"
    assert unsaid(Parameters("fox", scheduler="Euler"), studio) == ""


def test_encoders_are_compared_with_the_neighbours_that_are_asked_for(page, demo):
    settings = SETTINGS | {"neighbours": "blend"}
    messages = page.fire("draw_all", "", "fox", [NATIVE, demo.encoder], *settings.values(), session="nine")
    left, right = _changed(_shown(page, "draw_all", messages)["ab"])["value"]
    for picture in (left, right):
        assert len(read_parameters(picture["path"]).retrieval["neighbours"]) > 0


def test_a_tabs_prompt_follows_the_first_tab_until_somebody_writes_another(page):
    assert page.call("follow", "", "fox", None)[0] == "fox"
    assert page.call("follow", "fox", "owl", None)[0] == "owl"
    assert page.call("follow", "my own", "owl", None)[0] == "my own"


def test_on_loopback_no_page_elsewhere_reaches_it_under_another_name(demo, tmp_path):
    built, url = _launched(Studio(Engine(demo.pipeline, demo.index), tmp_path), _middleware(True))
    try:
        assert httpx.get(url).status_code == 200
        assert httpx.get(url, headers={"host": "evil.example.com"}).status_code == 400
        assert _middleware(False) == []
    finally:
        built.close(verbose=False)


def _until(reached):
    for _ in range(200):
        if reached():
            return
        time.sleep(0.1)
    raise AssertionError("it was not reached within 20 seconds")


def test_the_usual_encoder_of_the_pipeline_is_chosen_at_first_and_when_another_one_is_loaded(demo, tmp_path):
    engine = Engine(index=demo.index)
    built, url = _launched(Studio(engine, tmp_path, trusted=True))
    try:
        page = Page(url)
        assert page.props("encoder")["value"] == MULTILINGUAL
        assert page.props("compare-encoders")["value"] == [NATIVE, MULTILINGUAL]
        chosen = _opened(page, "", "seed=3", "one")["encoder"]
        assert _changed(chosen)["value"] == MULTILINGUAL
        chosen = _opened(page, "", link(Parameters("a fox", encoder=NATIVE)), "one")["encoder"]
        assert _changed(chosen)["value"] == NATIVE
        messages = page.fire("load_pipeline", demo.pipeline, "automatic", "automatic")
        for chosen in (_shown(page, "load_pipeline", messages), _opened(page, "", "", "one")):
            assert _changed(chosen["encoder"])["value"] == NATIVE
            assert [value for _, value in _changed(chosen["encoder"])["choices"]] == [NATIVE]
        foreign = _opened(page, "", link(Parameters("a fox", encoder=MULTILINGUAL)), "one")["encoder"]
        assert _changed(foreign)["value"] == NATIVE
        offered = _named(page, "offer", page.call("offer", [NATIVE, MULTILINGUAL]))
        assert _changed(offered["compare-encoders"])["value"] == [NATIVE]
        # a page that was open before still says the old one
        page.fire("find", "fox", NATIVE, "dense")
        stale = _shown(page, "find", page.fire("find", "fox", MULTILINGUAL, "dense"))
        assert _changed(stale["encoder"])["value"] == NATIVE
        assert Path(demo.pipeline).name in stale["loaded"]
        drawn = _shown(page, "run", _run(page, encoder=MULTILINGUAL))
        assert read_parameters(drawn["picture"]["path"]).encoder == NATIVE
    finally:
        built.close(verbose=False)


def test_only_the_typed_endpoints_are_public(client):
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == {"/generate", "/search", "/embed"}


def test_strangers_cannot_load_models_or_write_the_index(page, engine):
    messages = page.fire("load_pipeline", "reference", "automatic", "automatic")
    assert "chosen by who runs this server" in json.dumps(messages)
    assert engine.name != "reference"
    assert "only who runs this server" in json.dumps(page.fire("save", None))
