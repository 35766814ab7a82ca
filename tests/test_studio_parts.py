"""What the studio is made of, one by one, without a page."""

import os
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from textcond import PromptIndex
from textcond.apps import loading as loading_module
from textcond.apps.engine import Engine
from textcond.apps.metadata import Parameters, read_parameters, write_png
from textcond.apps.studio import Studio
from textcond.apps.studio.drawing import Step, Stopped, Waiting, drawing
from textcond.apps.studio.find import appended, caption
from textcond.apps.studio.history import KEPT, KEPT_DAYS, History, Made, forget_old
from textcond.apps.studio.line import Line, Pace
from textcond.apps.studio.links import LONGEST, link, read_link
from textcond.apps.studio.models import loading
from textcond.apps.studio.pictures import check_picture
from textcond.apps.studio.snippet import snippet
from textcond.pipelines.retrieval import suggest

MADE = Parameters(
    "ein roter Fuchs, «flat» & 100% 🦊",
    negative_prompt="snow=yes",
    seed=2**40,
    num_inference_steps=7,
    guidance_scale=4.5,
    width=96,
    height=64,
    scheduler="EulerDiscreteScheduler",
)


@pytest.fixture(scope="module")
def engine(demo):
    return Engine(demo.pipeline, demo.index)


def _job(engine, **values):
    return Parameters(**{"prompt": "a red fox!", "seed": 7, "num_inference_steps": 4, "pipeline": engine.name} | values)


def _draw(engine, tmp_path, *jobs, stop=None, line=None):
    return drawing(engine, jobs, History(tmp_path), stop or threading.Event(), line or Line())


def test_a_link_brings_everything_back_that_decides_a_picture():
    assert read_link(link(MADE)) == MADE
    assert read_link("") is None
    assert read_link("utm_source=x") is None
    assert read_link("prompt=") == Parameters("")
    assert read_link(link(MADE), "multilingual") == MADE
    assert read_link("prompt=", "multilingual") == Parameters("", encoder="multilingual")


def test_a_link_asks_for_the_neighbours_again():
    expanded = replace(
        MADE, prompt="a fox, noto style", retrieval={"mode": "expand", "strength": 0.5, "prompt": "a fox"}
    )
    again = read_link(link(expanded))
    assert (again.prompt, again.retrieval) == ("a fox", {"mode": "expand", "strength": 0.5})
    with pytest.raises(ValueError, match="MODE:STRENGTH"):
        read_link("neighbours=blend")


def test_neighbours_change_the_picture_and_what_they_were_is_kept(engine, tmp_path):
    plain = _job(engine, prompt="fox")
    assert engine.retrieved(plain) == plain
    blended = engine.retrieved(replace(plain, retrieval={"mode": "blend", "strength": 0.4}))
    hits = suggest(engine.finder(plain.encoder).index, "fox", 5)
    assert blended.retrieval["neighbours"] == [[hit.text, hit.score] for hit in hits]
    *_, without = _draw(engine, tmp_path, plain)
    *_, with_them = _draw(engine, tmp_path, blended)
    assert (np.asarray(Image.open(without.path)) != np.asarray(Image.open(with_them.path))).any()
    assert read_parameters(with_them.path).retrieval == blended.retrieval
    again, _ = engine.draw(read_parameters(with_them.path))
    np.testing.assert_array_equal(np.asarray(again), np.asarray(Image.open(with_them.path)))
    with pytest.raises(ValueError, match="no mode 'mix'"):
        engine.retrieved(replace(plain, retrieval={"mode": "mix", "strength": 0.4}))


def test_a_link_never_grows_beyond_what_browsers_take_and_a_broken_one_is_named():
    text = link(replace(MADE, prompt="fox " * 10_000))
    assert len(text) < LONGEST
    assert read_link(text).seed == MADE.seed
    with pytest.raises(ValueError, match="seed=red"):
        read_link("seed=red")
    with pytest.raises(ValueError, match="out of range"):
        read_link("seed=-3")


@pytest.mark.parametrize(
    ("scheduler", "swap", "mode"),
    [
        (None, False, None),
        ("EulerAncestralDiscreteScheduler", True, None),
        (None, False, "blend"),
        (None, True, "expand"),
    ],
    ids=["plain", "swapped", "blended", "expanded"],
)
def test_the_snippet_makes_the_same_picture_bit_by_bit(engine, demo, tmp_path, monkeypatch, scheduler, swap, mode):
    job = _job(
        engine,
        prompt='she said "fox"\n\\n',
        negative_prompt="snow",
        width=64,
        height=96,
        scheduler=scheduler,
        encoder=demo.encoder if swap else "native",
        retrieval={"mode": mode, "strength": 0.5} if mode else {},
    )
    if mode:
        job = engine.retrieved(job)
        assert job.retrieval["neighbours"]
    *_, made = _draw(engine, tmp_path, job)
    monkeypatch.chdir(tmp_path)
    exec(snippet(made.parameters), {})
    np.testing.assert_array_equal(np.asarray(Image.open("picture-7.png")), np.asarray(Image.open(made.path)))


def test_a_drawing_tells_its_steps_and_ends_with_a_picture_that_can_be_made_again(engine, tmp_path):
    events = drawing(engine, [_job(engine)], History(tmp_path), threading.Event(), Line())
    steps, previews = [], []
    for event in events:
        if isinstance(event, Step):
            steps.append((event.done, event.total))
            previews += [Image.open(event.preview).size] if event.preview else []
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert previews == [(128, 128)]
    assert event.path.name == "a-red-fox-7.png"
    assert read_parameters(event.path) == event.parameters
    image, _ = engine.draw(event.parameters)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(event.path)))


def test_a_drawing_stops_within_one_step_and_leaves_no_picture(engine, tmp_path):
    stop = threading.Event()
    events = _draw(engine, tmp_path, _job(engine, num_inference_steps=1000), stop=stop)
    assert isinstance(next(events), Step)
    stop.set()
    with pytest.raises(Stopped):
        list(events)
    assert not [path for path in tmp_path.rglob("*.png") if not path.name.startswith("step-")]
    assert isinstance(list(_draw(engine, tmp_path, _job(engine)))[-1], Made)


def test_a_page_that_goes_away_stops_its_drawing_and_leaves_the_line(engine, tmp_path):
    stop, line = threading.Event(), Line()
    events = _draw(engine, tmp_path, _job(engine, num_inference_steps=1000), stop=stop, line=line)
    next(events)
    events.close()
    assert not line.places
    assert not stop.is_set()  # which may be another drawing's, too
    began = time.monotonic()
    engine.draw(_job(engine))  # its thread has given the turn back
    assert time.monotonic() - began < 20


def test_an_error_of_the_drawing_reaches_who_waits(engine, demo, tmp_path):
    with pytest.raises(ValueError, match="48-wide"):
        list(_draw(engine, tmp_path, _job(engine, encoder=demo.wide)))


def test_who_comes_second_is_told_how_many_are_before_and_how_long(engine, tmp_path):
    line = Line()
    with line.place(10) as first:
        line.seconds_a_step = 2.0
        second = _draw(engine, tmp_path, _job(engine), line=line)
        assert next(second) == Waiting(1, 20.0)
        first.steps_left = 3
        assert next(second) == Waiting(1, 6.0)
    assert isinstance(list(second)[-1], Made)


def test_who_waits_can_leave_and_a_full_line_says_so(engine, tmp_path):
    line, stop = Line(most=2), threading.Event()
    with line.place(10):
        waiting = _draw(engine, tmp_path, _job(engine), stop=stop, line=line)
        next(waiting)
        with pytest.raises(ValueError, match="2 pictures are waited for"):
            list(_draw(engine, tmp_path, _job(engine), line=line))
        stop.set()
        with pytest.raises(Stopped):
            next(waiting)
        assert len(line.places) == 1


def test_who_wants_many_lets_others_draw_between_two_of_them(engine, tmp_path):
    line = Line()
    many, one = (_draw(engine, tmp_path, *[_job(engine)] * count, line=line) for count in (3, 1))
    while not isinstance(next(many), Made):
        pass
    assert isinstance(next(one), Waiting)
    assert isinstance(next(many), Waiting)
    assert isinstance(list(one)[-1], Made)
    assert sum(isinstance(event, Made) for event in many) == 2


def test_a_larger_picture_counts_for_more_steps(engine, tmp_path):
    engine.warm_up()
    line = Line()
    with line.place(1):
        large = _draw(engine, tmp_path, _job(engine, width=256, height=256), line=line)
        next(large)
        assert line.places[1].steps_left == 4 * 4
        large.close()


def test_the_pace_of_the_line_follows_the_steps(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    line = Line()
    with line.place(100) as place:
        pace = Pace(place)
        for _ in range(60):
            left = pace.step()
            now[0] += 3.0
    assert line.seconds_a_step == pytest.approx(3.0, rel=0.01)
    assert left == pytest.approx(40 * 3.0, rel=0.01)


def test_the_history_is_what_lies_in_the_folder_and_the_oldest_goes(tmp_path):
    history = History(tmp_path)
    for number in range(KEPT + 2):
        path = history.new_folder() / "fox.png"
        write_png(path, Image.new("RGB", (8, 8)), Parameters(f"fox {number}"))
        history.added(Made(path, Parameters(f"fox {number}")))
    again = History(tmp_path, history.token).pictures()
    assert [made.parameters.prompt for made in again] == [f"fox {number}" for number in range(KEPT + 1, 1, -1)]
    assert History(tmp_path).pictures() == []


def test_previews_and_stopped_runs_are_removed_once_nobody_looks_at_them(tmp_path):
    history = History(tmp_path)
    old, stopped, running = history.new_folder(), history.new_folder(), history.new_folder()
    write_png(old / "fox.png", Image.new("RGB", (8, 8)), MADE)
    for folder in (old, stopped, running):
        Image.new("RGB", (8, 8)).save(folder / "step-2.png")
    assert [made.path.name for made in history.pictures()] == ["fox.png"]
    for folder in (old, stopped):
        os.utime(folder, (0, 0))
    history.new_folder()
    assert [path.name for path in old.iterdir()] == ["fox.png"]
    assert not stopped.exists()
    assert (running / "step-2.png").exists()


def test_favourites_outlive_what_else_is_forgotten(tmp_path, monkeypatch):
    history = History(tmp_path)
    names = []
    for number in range(KEPT + 3):
        path = history.new_folder() / "fox.png"
        names.append(path.parent.name)
        write_png(path, Image.new("RGB", (8, 8)), Parameters(f"fox {number}"))
        if number in (0, 1):
            history.star(names[number])
        history.added(Made(path, Parameters(f"fox {number}")))
    again = History(tmp_path, history.token)
    kept = [f"fox {number}" for number in (*range(KEPT + 2, 2, -1), 1, 0)]
    assert [made.parameters.prompt for made in again.pictures()] == kept
    assert [made.favourite for made in again.pictures()] == [False] * KEPT + [True] * 2
    again.star(names[1])
    for name in ("../..", "0" * 16, names[2]):  # no picture, or one that is forgotten
        again.star(name)
    assert [made.parameters.prompt for made in again.pictures() if made.favourite] == ["fox 0"]
    monkeypatch.setattr("textcond.apps.studio.history.MOST_FAVOURITES", 1)
    with pytest.raises(ValueError, match="1 pictures are favourites"):
        again.star(names[-1])
    os.utime(history.folder, (0, 0))
    forget_old(tmp_path)
    assert [made.parameters.prompt for made in again.pictures()] == ["fox 0"]


@pytest.mark.parametrize("token", ["../../etc", "", None, "A" * 32, "0" * 31])
def test_a_token_is_no_path(tmp_path, token):
    history = History(tmp_path, token)
    assert history.token != token
    assert history.folder.parent == tmp_path


def test_visitors_of_long_ago_are_forgotten(engine, tmp_path):
    studio = Studio(engine, tmp_path)
    old, new = studio.history(None), studio.history(None)
    for history in (old, new):
        history.new_folder()
    mine = old.folder.with_name("mine")
    mine.mkdir()
    long_ago = time.time() - (KEPT_DAYS + 1) * 24 * 3600
    for folder in (old.folder, mine):
        os.utime(folder, (long_ago, long_ago))
    studio.forget_old()
    assert sorted(path.name for path in mine.parent.iterdir()) == sorted([new.folder.name, "mine"])


def test_another_pipeline_is_loaded_part_by_part_and_takes_the_place_of_the_first(demo):
    engine = Engine(demo.pipeline, demo.index)
    before, _ = engine.draw(_job(engine))
    told = list(loading(engine, demo.pipeline, "cpu", "bfloat16", threading.Event()))
    parts = [what.split(" ")[0] for _, what in told]
    assert [part for part in parts if part not in ("finding", "waiting")] == ["text_encoder", "unet", "vae", "moving"]
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert engine.place == "cpu, bfloat16"
    after, _ = engine.draw(_job(engine))
    assert (np.asarray(before) != np.asarray(after)).any()


def test_loading_can_be_cancelled_and_what_cannot_be_loaded_leaves_the_present_one(demo):
    engine = Engine(demo.pipeline, demo.index)
    engine.warm_up()
    stop = threading.Event()
    events = loading(engine, demo.pipeline, None, "bfloat16", stop)
    next(events)
    stop.set()
    with pytest.raises(Stopped):
        list(events)
    with pytest.raises(FileNotFoundError, match="no pipeline folder"):
        list(loading(engine, "nothing here", None, None, threading.Event()))
    assert engine.place == "cpu, float32"


def test_a_hub_that_does_not_answer_keeps_nobody_from_loading_another_pipeline(demo, monkeypatch):
    engine, answers = Engine(demo.pipeline, demo.index), threading.Event()
    find = loading_module.find_pipeline

    def slow(name):
        return answers.wait(60) and find(demo.pipeline) if name == "far/away" else find(name)

    monkeypatch.setattr("textcond.apps.engine.find_pipeline", slow)
    stop = threading.Event()
    cancelled = loading(engine, "far/away", None, None, stop)
    next(cancelled)
    stop.set()
    with pytest.raises(Stopped):
        list(cancelled)
    assert list(loading(engine, demo.pipeline, None, "bfloat16", threading.Event()))
    answers.set()  # the one that was cancelled changes nothing any more
    time.sleep(1)
    assert (engine.name, engine.place) == (demo.pipeline, "cpu, bfloat16")


def test_what_the_pipeline_expects_is_told(engine):
    (contract,) = engine.contracts()
    assert contract.token_width == 32
    assert not contract.problems


def test_an_encoder_is_measured_beside_another(engine, demo):
    native, other = engine.read("a red fox"), engine.read("a red fox", demo.encoder)
    assert native.cosine(native) == pytest.approx(1)
    assert abs(native.cosine(other)) < 1
    assert (native.tokens, native.limit) == (7, 30)
    assert native.seconds > 0


def test_what_is_made_is_saved_with_its_parameters_and_found_by_every_encoder(demo, tmp_path):
    PromptIndex.open(demo.index).save(tmp_path / "index")
    engine = Engine(demo.pipeline, tmp_path / "index")
    finders = [engine.finder(), engine.finder(demo.encoder)]
    size = len(finders[0])
    *_, plain = _draw(engine, tmp_path, _job(engine, prompt="a plain ship", seed=0))
    engine.save(plain.path, plain.parameters)
    (hit,) = finders[0].search("a plain ship", 1)
    assert (hit.metadata["seed"], hit.metadata["negative_prompt"]) == (0, "")
    size += 1
    *_, made = _draw(engine, tmp_path, _job(engine, prompt="a green owl", negative_prompt="snow"))
    assert engine.save(made.path, made.parameters) == size + 1
    assert engine.save(made.path, made.parameters) == size + 1
    for finder in (*finders, Engine(demo.pipeline, tmp_path / "index").finder()):
        (hit,) = finder.search("a green owl", 1)
        assert (hit.text, hit.metadata["seed"], hit.metadata["negative_prompt"]) == ("a green owl", 7, "snow")
        assert hit.image.size == (128, 128)
    with pytest.raises(ValueError, match="empty prompt"):
        engine.save(made.path, replace(made.parameters, prompt=" "))


def test_what_is_saved_into_the_index_of_the_reference_model_goes_into_a_copy(demo, tmp_path, monkeypatch):
    monkeypatch.setattr("textcond.apps.engine.open_index", lambda path: PromptIndex.open(path or demo.index))
    path = tmp_path / "fox.png"
    write_png(path, Image.new("RGB", (8, 8)), MADE)
    engine = Engine(own_index=tmp_path / "mine")
    size = len(engine.finder())
    assert engine.save(path, MADE) == size + 1
    for finder in (engine.finder(), Engine(own_index=tmp_path / "mine").finder()):
        assert finder.search(MADE.prompt, 1)[0].text == MADE.prompt
    assert len(PromptIndex.open(demo.index)) == size
    with pytest.raises(ValueError, match="stays as it is"):
        Engine().save(path, MADE)


def test_appending_leaves_out_what_the_prompt_has():
    assert appended("red fox, Noto style", "blue cat, noto style") == "red fox, Noto style, blue cat"
    assert appended(" ", "blue cat, noto style") == "blue cat, noto style"


def test_the_caption_says_what_the_order_is_by():
    hit = SimpleNamespace(text="red fox", score=0.876, dense_rank=1, lexical_rank=None)
    assert caption(hit, "dense") == "0.88 · red fox"
    assert caption(hit, "hybrid") == "red fox"
    assert caption(hit, None) == "red fox"


def test_a_file_is_judged_by_its_content(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "fox.txt", "JPEG")
    assert check_picture(tmp_path / "fox.txt") == "JPEG"
    (tmp_path / "page.png").write_text("<script>alert(1)</script>")
    with pytest.raises(ValueError, match=r"page\.png is not a readable picture"):
        check_picture(tmp_path / "page.png")
    Image.new("1", (10_000, 6_000)).save(tmp_path / "huge.png")
    with pytest.raises(ValueError, match="at most"):
        check_picture(tmp_path / "huge.png")
