"""The map of the index: where rows lie, how maps are kept, and what the tab does with them."""

import json
import threading
import time
import urllib.request

import numpy as np
import pytest
from studio_page import Page
from styled_index import STYLES, TEXTS, styled_index

from textcond import Hit, PromptIndex
from textcond.apps.engine import Engine
from textcond.apps.finder import Finder
from textcond.apps.metadata import NATIVE
from textcond.apps.studio import Studio, build, maps
from textcond.apps.studio.drawing import Stopped
from textcond.apps.studio.maps import COLOURS, IndexMap, Maps, Progress, fields
from textcond.apps.studio.projection import between, project


def _clusters(count=60, groups=3, dim=16):
    generator = np.random.default_rng(1)
    of = np.arange(count) % groups
    vectors = 4 * generator.standard_normal((groups, dim))[of] + generator.standard_normal((count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), of


def _apart(points, of):
    """The least distance between the middles of the groups, by how far the groups reach."""
    middles = np.stack([points[of == group].mean(0) for group in range(of.max() + 1)])
    spread = max(np.linalg.norm(points[of == group] - middles[group], axis=1).mean() for group in range(of.max() + 1))
    between_them = np.linalg.norm(middles[:, None] - middles[None], axis=-1)
    return between_them[np.triu_indices(len(middles), 1)].min() / spread


def test_what_is_alike_lies_together_and_the_same_vectors_lie_the_same():
    vectors, of = _clusters()
    points = project(vectors)
    assert points.shape == (60, 2)
    assert points.dtype == np.float32
    assert np.abs(points).max() == pytest.approx(1)
    assert _apart(points, of) > 3
    np.testing.assert_array_equal(project(vectors), points)


def test_beyond_a_sample_the_others_are_placed_among_it(monkeypatch):
    monkeypatch.setattr("textcond.apps.studio.projection.SAMPLE", 40)
    vectors, of = _clusters(90)
    told = []
    points = project(vectors, lambda what, done, total: told.append(what))
    assert _apart(points, of) > 3
    assert list(dict.fromkeys(told)) == ["Comparing the prompts", "Arranging them", "Placing the others among them"]


@pytest.mark.parametrize("count", [1, 2, 9, 12])
def test_few_or_equal_rows_have_a_map_too(count):
    points = project(np.tile(np.eye(1, 8, dtype=np.float32), (count, 1)))
    assert points.shape == (count, 2)
    assert np.isfinite(points).all()


def test_what_equals_a_neighbour_lies_where_it_lies_and_a_far_one_hardly_pulls():
    points = np.array([[0.5, 0.5], [0.52, 0.5], [0.5, 0.53], [-0.9, -0.9]])
    np.testing.assert_allclose(between([1.0, 0.7, 0.7, 0.7], points), points[0], atol=1e-3)
    assert np.linalg.norm(between([0.7, 0.69, 0.68, 0.68], points) - points[0]) < 0.05


def test_style_and_language_come_first_and_fields_of_many_values_do_not_count():
    rows = [
        Hit(
            str(n),
            0,
            "",
            {"seed": n, "kind": n % 2, "language": "en" if n % 3 else "de", "style": STYLES[n % 3], "l": []},
        )
        for n in range(60)
    ]
    rows.append(Hit("last", 0, "", {}))
    style, language, kind = fields(rows)
    assert [style.name, language.name, kind.name] == ["style", "language", "kind"]
    assert language.values == ["en", "de", "none"]
    assert [language.values[code] for code in language.codes[[0, 1, 60]]] == ["de", "en", "none"]


def test_rare_values_share_a_colour():
    rows = [Hit(str(n), 0, "", {"style": f"style {n % (COLOURS + 5)}"}) for n in range(60)]
    (style,) = fields(rows)
    assert len(style.values) == COLOURS
    assert style.values[-1] == "other"
    assert style.codes.max() == COLOURS - 1


@pytest.fixture(scope="module")
def engine(demo, tmp_path_factory):
    return Engine(demo.pipeline, styled_index(tmp_path_factory.mktemp("explore") / "index", demo))


def _made(store, finder):
    *progress, made = store.follow(finder, threading.Event())
    assert isinstance(made, IndexMap)
    return progress, made


def test_a_map_is_made_once_and_kept_over_a_restart(engine, tmp_path, monkeypatch):
    progress, made = _made(Maps(tmp_path), engine.finder())
    assert progress
    assert [path.stem for path in tmp_path.iterdir()] == [made.key]
    monkeypatch.setattr(maps, "project", None)  # nothing is computed any more
    progress, again = _made(Maps(tmp_path), engine.finder())
    assert not progress
    assert again.ids == made.ids
    np.testing.assert_array_equal(again.points, made.points)


def test_another_text_or_encoder_is_another_map(engine, demo, tmp_path):
    index = PromptIndex(engine.finder().encoder)
    index.add(["a", "b"])
    store = Maps(tmp_path)
    first = _made(store, Finder(index))[1]
    index.add(["c"])
    assert len(_made(store, Finder(index))[1].ids) == 3
    assert _made(store, engine.finder(demo.encoder))[1].key != _made(store, engine.finder())[1].key
    index.delete(first.ids)
    assert len(_made(store, Finder(index))[1].ids) == 1
    index.delete(filter={})
    with pytest.raises(ValueError, match="the index is empty"):
        _made(store, Finder(index))


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01", b"hello"])
def test_a_damaged_file_is_made_again(engine, tmp_path, content):
    made = _made(Maps(tmp_path), engine.finder())[1]
    (tmp_path / f"{made.key}.npy").write_bytes(content)
    np.testing.assert_array_equal(_made(Maps(tmp_path), engine.finder())[1].points, made.points)
    assert np.load(tmp_path / f"{made.key}.npy").shape == (len(TEXTS), 2)


def test_maps_that_are_long_out_of_use_are_removed(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(maps, "KEPT", 2)
    index, store = PromptIndex(engine.finder().encoder), Maps(tmp_path)
    for text in "abcd":
        index.add([text])
        last = _made(store, Finder(index))[1]
    assert len(list(tmp_path.iterdir())) == 2
    assert (tmp_path / f"{last.key}.npy").exists()


def test_a_new_row_lies_between_its_neighbours_and_nothing_else_moves(engine, tmp_path, monkeypatch):
    index, store = PromptIndex(engine.finder().encoder), Maps(tmp_path)
    index.add([f"red fox {number}" for number in range(60)] + [f"blue apple {number}" for number in range(60)])
    before = _made(store, Finder(index))[1]
    monkeypatch.setattr(maps, "project", lambda *arguments: pytest.fail("it was made anew"))
    (new,) = index.add(["red fox 7!"])
    events = list(store.follow(Finder(index), threading.Event()))
    (after,) = events
    for name, place in before.places.items():
        np.testing.assert_array_equal(after.points[after.places[name]], before.points[place])
    near = [before.points[before.places[hit.id]] for hit in Finder(index).similar(new, 8)]
    assert (np.min(near, 0) <= after.points[after.places[new]]).all()
    assert (after.points[after.places[new]] <= np.max(near, 0)).all()
    assert Maps(tmp_path)._read(after.key, 121) is not None
    with monkeypatch.context() as anew:
        anew.setattr(maps, "project", lambda vectors, told: np.ones((len(vectors), 2), np.float32))
        index.add([f"owl {number}" for number in range(5)])
        assert (_made(store, Finder(index))[1].points == 1).all()


class Slow:
    """A projection that goes on until it is told to end."""

    def __init__(self):
        self.calls, self.stopped, self.end = 0, threading.Event(), threading.Event()

    def __call__(self, vectors, on_progress):
        self.calls += 1
        try:
            for done in range(10_000):
                on_progress("Arranging them", done, 10_000)
                if self.end.wait(0.005):
                    return np.zeros((len(vectors), 2), np.float32)
        except Stopped:
            self.stopped.set()
            raise


@pytest.fixture
def slow(monkeypatch):
    projection = Slow()
    monkeypatch.setattr(maps, "project", projection)
    yield projection
    projection.end.set()


def test_two_wait_for_one_map_and_it_stops_when_the_last_of_them_cancels(engine, tmp_path, slow):
    store, stops = Maps(tmp_path), [threading.Event(), threading.Event()]
    followed = [store.follow(engine.finder(), stop) for stop in stops]
    assert all(isinstance(next(one), Progress) for one in followed)
    for one, stop in zip(followed, stops):
        assert not slow.stopped.is_set()
        stop.set()
        with pytest.raises(Stopped):
            list(one)
    assert slow.stopped.wait(10)
    assert slow.calls == 1
    assert not list(tmp_path.iterdir())


def test_who_leaves_the_page_finds_the_map_later(engine, tmp_path, slow):
    store = Maps(tmp_path)
    left = store.follow(engine.finder(), threading.Event())
    next(left)
    left.close()
    follower = store.follow(engine.finder(), threading.Event())
    until = time.monotonic() + 20
    while (progress := next(follower)).seconds is None:
        assert time.monotonic() < until
    assert progress.what == "Arranging them"
    assert 0 < progress.share < 1
    slow.end.set()
    assert isinstance(list(follower)[-1], IndexMap)
    assert slow.calls == 1


def test_a_failure_is_told_and_the_next_one_tries_again(engine, tmp_path, monkeypatch):
    store = Maps(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(maps, "project", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(store.follow(engine.finder(), threading.Event()))
    assert _made(store, engine.finder())[1]


@pytest.fixture(scope="module")
def page(engine, demo, tmp_path_factory):
    built = build(Studio(engine, tmp_path_factory.mktemp("studio"), encoders=[demo.encoder]))
    _, url, _ = built.queue(default_concurrency_limit=4).launch(
        prevent_thread_lock=True, quiet=True, footer_links=[], run_history=False
    )
    yield Page(url)
    built.close(verbose=False)


def _values(page, name, *inputs, session="one", event_data=None):
    """The values that the end of an event gives, by elem_id."""
    last = page.fire(name, *inputs, session=session, event_data=event_data)[-1]
    assert last["success"], last
    names = {one["id"]: one["props"].get("elem_id") or one["type"] for one in page.config["components"]}
    return {names[number]: value for number, value in zip(page.events[name]["outputs"], last["output"]["data"])}


def _ask(page, function, data):
    """Call a server function of the map as its script does."""
    (component,) = [one["id"] for one in page.config["components"] if one["props"].get("elem_id") == "map"]
    body = {"data": data, "component_id": component, "fn_name": function, "session_hash": "one"}
    return page._read("gradio_api/component_server/", body)


def _opened(page, session):
    return _values(page, "open_map", NATIVE, session=session)["map"]["value"]


def test_the_tab_shows_the_map_places_the_prompt_and_opens_a_row(page):
    key = _opened(page, "one")
    told = _ask(page, "points", key)
    assert [one["name"] for one in told["fields"]] == ["style", "language"]
    assert told["fields"][0]["counts"] == [8, 8, 8]
    placed = _values(page, "place", None, "red a, noto style", NATIVE)
    assert placed["map"]["props"]["prompt"]["key"] == key
    (nearest, *_) = placed["map"]["props"]["near"]["rows"]
    (row,) = _ask(page, "rows", [key, [nearest]]).values()
    assert row["text"] == "red a, noto style"
    with urllib.request.urlopen(f"{page.url}gradio_api/file={row['path']}") as answer:
        assert answer.headers["Content-Type"] == "image/png"
    shown = _values(page, "pick_dot", None, NATIVE, event_data={"index": nearest, "value": key})
    assert shown["map"]["props"]["picked"] == nearest
    assert "red a, noto style" in shown["explore-card"]
    assert nearest not in shown["map"]["props"]["near"]["rows"]
    used = _values(page, "use_it", None)
    assert (used["prompt"], used["seed"], used["random"]) == ("red a, noto style", 50, False)


def test_one_of_the_neighbours_can_be_opened(page):
    key = _opened(page, "two")
    placed = _values(page, "place", None, "blue d, flat style", NATIVE, session="two")
    event = {"index": 2, "value": None}
    shown = _values(page, "pick_tile", None, NATIVE, None, session="two", event_data=event)
    third = placed["map"]["props"]["near"]["rows"][2]
    assert shown["map"]["props"]["picked"] == third
    assert _ask(page, "rows", [key, [third]])[str(third)]["text"] in shown["explore-card"]


def test_an_empty_prompt_has_no_place(page):
    _opened(page, "three")
    placed = _values(page, "place", None, " ", NATIVE, session="three")
    assert placed["map"]["props"]["prompt"] == placed["map"]["props"]["near"] == {}


@pytest.mark.parametrize(
    "wanted", [None, 5, {}, [], ["key", [0]], [0, 1], "KEY", ["KEY", ["0", -1, 24, 1e9, None, {}]]]
)
def test_whatever_is_asked_of_the_map_is_answered(page, wanted):
    key = _opened(page, "four")
    assert _ask(page, "rows", json.loads(json.dumps(wanted).replace("KEY", key))) == {}
    assert _ask(page, "points", wanted) is None


@pytest.mark.parametrize("event", [{"index": 24, "value": "KEY"}, {"index": 0, "value": "no key"}])
def test_a_click_beside_the_rows_opens_nothing(page, event):
    key = _opened(page, "five")
    event = event | {"value": event["value"].replace("KEY", key)}
    shown = _values(page, "pick_dot", None, NATIVE, session="five", event_data=event)
    assert "value" not in shown["explore-card"]
    assert "picked" not in shown["map"]["props"]


def test_cancel_ends_the_drawing_of_a_map(page, demo, tmp_path, slow):
    messages = page.messages("open_map", demo.encoder, session="six")
    for message in messages:
        if message["msg"] == "process_generating" and "first time only" in json.dumps(message):
            page.call("cancel_map", session="six")
            break
    assert "Cancelled" in json.dumps(list(messages))
    assert slow.stopped.wait(10)
