import json
import threading
import time

import numpy as np
import pytest
from PIL import Image
from studio_page import SETTINGS, Page

from textcond.apps.engine import Engine
from textcond.apps.metadata import MULTILINGUAL, Parameters, read_parameters
from textcond.apps.studio import Studio, build
from textcond.apps.studio.axes import NOTHING, WORDS, cells, example, read_axis
from textcond.apps.studio.shared import MAX_CELLS
from textcond.apps.studio.sheet import sheet


@pytest.fixture(scope="module")
def studio(demo, tmp_path_factory):
    return Studio(Engine(demo.pipeline, demo.index), tmp_path_factory.mktemp("studio"), encoders=[demo.encoder])


@pytest.fixture(scope="module")
def page(studio):
    built = build(studio)
    _, url, _ = built.queue(default_concurrency_limit=4).launch(
        prevent_thread_lock=True, quiet=True, footer_links=[], run_history=False
    )
    yield Page(url)
    built.close(verbose=False)


@pytest.mark.parametrize(
    ("what", "text", "values"),
    [
        ("steps", "4, 8,12", (4, 8, 12)),
        ("steps", "2-8(2), 3", (2, 4, 6, 8, 3)),
        ("steps", "3-1", (3, 2, 1)),
        ("guidance", "1 - 2 (0.5), 2", (1.0, 1.5, 2.0)),
        ("seed", "4294967294-4294967295", (2**32 - 2, 2**32 - 1)),
        ("sampler", "eulerdiscrete, DDIMScheduler", ("EulerDiscreteScheduler", "DDIMScheduler")),
        (WORDS, 'red, "blue, green", ', ("red", "blue, green", "")),
        (NOTHING, "4", (None,)),
    ],
)
def test_values_are_read_as_they_are_typed(studio, what, text, values):
    assert read_axis(what, text, studio).values == values


@pytest.mark.parametrize(
    ("what", "text", "message"),
    [
        ("steps", "", "steps has no values: type some, parted by commas, as 5, 10"),
        ("steps", "4, four", "steps 'four' is no number"),
        ("steps", "0", "steps 0 is out of range: pass 1 to 60"),
        ("steps", "2.5", "no whole number"),
        ("guidance", "1-99(49)", "guidance 50 is out of range"),
        ("seed", "1-999999999", "more than 36 values"),
        ("seed", "1-9(0)", "more than 36 values"),
        ("seed", "1-30, 31-60", "60 values"),
        ("sampler", "os.system", "no sampler 'os.system': choose from DDIM"),
        ("text encoder", "/etc", "'/etc' is not offered here"),
        ("text encoder", MULTILINGUAL, "not offered here"),
        (WORDS, ", blue", "is empty"),
    ],
)
def test_a_value_that_is_none_is_named(studio, what, text, message):
    with pytest.raises(ValueError, match=message):
        read_axis(what, text, studio)


@pytest.mark.parametrize("what", ["steps", "guidance", "seed", "text encoder", "sampler"])
def test_the_example_can_be_drawn(studio, what):
    assert len(read_axis(what, example(what, studio), studio).values) > 1


def test_the_cells_go_row_by_row_and_words_are_replaced_in_both_prompts(studio):
    first = Parameters("a red fox", "red snow", seed=3)
    words, steps = read_axis(WORDS, "red, blue", studio), read_axis("steps", "2, 4", studio)
    made = cells(first, steps, words)
    assert [(one.prompt, one.negative_prompt, one.num_inference_steps, one.seed) for one in made] == [
        ("a red fox", "red snow", 2, 3),
        ("a red fox", "red snow", 4, 3),
        ("a blue fox", "blue snow", 2, 3),
        ("a blue fox", "blue snow", 4, 3),
    ]
    nothing = read_axis(NOTHING, "", studio)
    assert cells(first, nothing, words) == [first, Parameters("a blue fox", "blue snow", seed=3)]
    for sides, message in (
        ((steps, steps), "both sides go through the steps"),
        ((nothing, nothing), "both sides go through nothing"),
        ((read_axis(WORDS, "owl, cat", studio), steps), "“owl” is not in the prompt"),
        ((read_axis("steps", "1-7", studio), read_axis("seed", "1-6", studio)), "makes 42 pictures"),
    ):
        with pytest.raises(ValueError, match=message):
            cells(first, *sides)


def test_the_sheet_has_every_picture_in_its_place_and_the_labels_beside_them():
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250), (250, 0, 250)]
    pictures = [Image.new("RGB", (64, 48), colour) for colour in colours]
    plain = sheet(pictures, ["", "", ""], ["", ""])
    labelled = sheet(pictures, ["steps 4", "steps 8", "赤い" * 40], ["ein sehr langer Name" * 9, "ثعلب"])
    for page in (plain, labelled):
        found = [colour for _, colour in page.getcolors(2**24) if colour in colours]
        assert sorted(found) == sorted(colours)
        places = [np.argwhere((np.asarray(page) == colour).all(-1)) for colour in colours]
        assert [len(place) for place in places] == [64 * 48] * 6
        tops, lefts = ([tuple(place.min(0))[axis] for place in places] for axis in (0, 1))
        assert tops == [tops[0]] * 3 + [tops[3]] * 3
        assert lefts == lefts[:3] * 2
        assert (tops[0], lefts[0]) < (tops[3], lefts[1])
    dark = (np.asarray(labelled.convert("L")) < 60) & (np.asarray(labelled).max(-1) < 60)
    assert dark.any(1)[:30].any()
    assert dark.any(0)[:200].any()
    assert labelled.width > plain.width
    huge = sheet([Image.new("RGB", (1024, 1024))] * 36, [""] * 6, [""] * 6)
    assert max(huge.size) < 4200


def _draw(page, columns, rows, *, session="one", prompt="a red fox", **changed):
    inputs = ["", prompt, *columns, *rows, *(SETTINGS | changed).values()]
    messages = page.fire("draw_grid", *inputs, session=session)
    assert messages[-1]["success"], messages[-1]
    ids = page.events["draw_grid"]["outputs"]
    names = {one["id"]: one["props"].get("elem_id") or one["type"] for one in page.config["components"]}
    # The stream tells what changed: the last word on each component counts.
    return {names[number]: value for number, value in zip(ids, messages[-1]["output"]["data"])}, messages


def test_a_grid_is_drawn_cell_by_cell_and_downloaded_with_what_made_it(page, studio, demo):
    shown, messages = _draw(page, ("steps", "1, 2"), ("text encoder", f"native, {demo.encoder}"))
    assert "4 pictures in" in shown["grid-status"]
    assert "Picture 3 of 4" in json.dumps(messages)
    (folder,) = (studio.folder / "grids").iterdir()
    made = [read_parameters(path) for path in sorted(folder.glob("*/a-red-fox-5.png"))]
    assert [(one.num_inference_steps, one.encoder) for one in made] == [
        (1, "native"), (2, "native"), (1, demo.encoder), (2, demo.encoder)
    ]  # fmt: skip
    path = shown["grid-download"]["value"]["path"]
    assert read_parameters(path) == made[0]
    with Image.open(path) as image:
        assert image.width > 2 * 128
    picked = page.fire("pick", None, "", session="one", event_data={"index": 3, "value": None})
    assert picked[-1]["success"]
    assert demo.encoder in json.dumps(picked[-1]["output"]["data"])
    # the next grid takes the place of this one, the picked picture stays
    (kept,) = (studio.folder / "made").glob("*/*/*.png")
    assert read_parameters(kept) == made[3]


def test_what_cannot_be_drawn_is_said(page):
    for columns, rows, message in (
        (("steps", "1-13"), ("seed", "1-3"), "39 pictures: a grid has at most 36"),
        (("steps", "x"), (NOTHING, ""), "is no number"),
        ((NOTHING, ""), (NOTHING, ""), "both sides go through nothing"),
    ):
        shown, _ = _draw(page, columns, rows)
        assert message in shown["grid-status"]


def test_a_grid_is_stopped_within_a_step(page, studio):
    ended = []
    asked = ("steps", "60"), ("seed", f"1-{MAX_CELLS}")
    thread = threading.Thread(target=lambda: ended.append(_draw(page, *asked, session="two")))
    thread.start()
    while thread.is_alive():
        page.call("halt_2", session="two")
        time.sleep(0.2)
    assert "Stopped." in json.dumps(ended[0][1])
