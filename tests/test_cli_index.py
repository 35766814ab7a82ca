import contextlib
import io
import itertools
import json
import multiprocessing
import os
import random
import signal
import time
import zipfile

import numpy as np
import pytest
from pictures import TOOLS, picture, write_png
from rich.console import Console
from tiny import backbone, text_encoder

from textcond import Hit, PromptIndex, TextEncoder
from textcond.apps.cli import main
from textcond.apps.index import hits_table, parse_filters
from textcond.pipelines.reference import open_reference_index

ROWS = [
    {"text": "a red fox in the snow", "style": "noto", "steps": 20},
    {"text": "a blue whale at sea", "style": "noto", "steps": 30},
    {"text": "赤い狐、雪の中", "style": "twemoji", "steps": 50},
]


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run the command in `tmp_path`; give back its exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", dict(os.environ))

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        return (end.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    text_encoder().save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.fixture
def built(run, rows, encoder):
    """An index of `ROWS` in the folder `idx`."""
    code, out, err = run("index", "build", "idx", rows, "--encoder", encoder)
    assert (code, err) == (0, "")
    assert out == "idx: 3 rows added, 0 were there already\n"
    return "idx"


def test_build_add_stats_and_optimize(run, rows, encoder, built, tmp_path):
    assert run("index", "add", built, rows)[1] == "idx: 0 rows added, 3 were there already\n"
    assert not list(tmp_path.rglob("feeding.json"))
    (tmp_path / "more.txt").write_text("a green frog\n\xff\n", encoding="latin-1")
    code, out, _ = run("index", "add", built, "more.txt")
    assert code == 0
    assert "1 rows added, 0 were there already, 1 skipped (1 x not UTF-8), the first:" in out
    code, out, err = run("index", "add", built, "more.txt", "--strict")
    assert (code, out) == (1, "")
    assert "more.txt:2: not UTF-8" in err
    told = json.loads(run("index", "stats", built, "--json")[1])
    assert told["rows"] == 4
    assert told["dim"] == 32
    assert "rows: 4" in run("index", "stats", built)[1]
    assert run("index", "optimize", built)[:2] == (0, "idx\n")


def test_building_twice_says_what_adds(run, rows, encoder, built):
    code, out, err = run("index", "build", built, rows, "--encoder", encoder)
    assert (code, out) == (1, "")
    assert "there is an index at idx already" in err
    assert "textcond index add" in err


def test_sources_without_a_row_are_an_error_and_the_mended_ones_go_into_the_same_index(run, rows, encoder, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\xff\n")
    code, out, err = run("index", "build", "idx", "bad.txt", "--encoder", encoder)
    assert (code, out) == (1, "")
    assert "idx is still empty, no row of bad.txt could be used: 0 rows added" in err
    assert "not UTF-8" in err
    assert run("index", "build", "idx", rows, "--encoder", encoder)[:2] == (
        0,
        "idx: 3 rows added, 0 were there already\n",
    )


def test_a_build_that_was_stopped_is_taken_up_by_the_same_command(run, rows, encoder, monkeypatch, tmp_path):
    add = PromptIndex.add

    def stopped(index, *arguments, **options):
        if len(index):
            signal.raise_signal(signal.SIGINT)
        return add(index, *arguments, **options)

    monkeypatch.setattr(PromptIndex, "add", stopped)
    command = ("index", "build", "idx", rows, "--encoder", encoder, "--batch-size", 1)
    assert run(*command)[0] == 130
    assert len(PromptIndex.open("idx")) == 1
    monkeypatch.setattr(PromptIndex, "add", add)
    assert run(*command)[:2] == (0, "idx: 2 rows added, 0 were there already\n")


def contents(path):
    """Every row of an index, in the order of ids, and their vectors."""
    batches = PromptIndex.open(path).store.scan(None, batch=1000, vectors=True, images=False)
    rows = sorted(itertools.chain.from_iterable(batches), key=lambda row: row.id)
    return [(row.id, row.text, row.metadata) for row in rows], np.array([row.vector for row in rows])


# forked from a process that has imported what takes seconds, so that random moments are of the build
WARM = multiprocessing.get_context("forkserver")
WARM.set_forkserver_preload(["textcond.apps.index", "textcond.index.feed", "textcond.index.image_text"])


class KilledBuild:
    """`textcond index build` of numbered rows in a process of its own, again and again, and what it leaves."""

    BATCH = 20

    def __init__(self, folder, encoder, rows):
        self.folder, self.rows, self.least, self.path = folder, rows, 0, folder / "0"
        self.source, self.encoder = folder / "rows.jsonl", encoder
        lines = (json.dumps({"text": f"prompt {row}", "row": row}) + "\n" for row in range(rows))
        self.source.write_text("".join(lines))

    def arguments(self, path):
        return [
            str(one) for one in ("index", "build", path, self.source, "-e", self.encoder, "--batch-size", self.BATCH)
        ]

    def start(self):
        process = WARM.Process(target=main, args=(self.arguments(self.path),))
        process.start()
        return process

    @property
    def read(self):
        """How many rows the mark acknowledges; None without one."""
        mark = self.path / "feeding.json"
        return sum(row for *_, row in json.loads(mark.read_text())["rows"].values()) if mark.exists() else None

    def check_killed(self):
        """Whole batches from the first row on, no fewer than before or than were acknowledged."""
        for partial in self.path.glob("*.partial"):
            os.utime(partial, (0, 0))  # as if the next try came an hour later
        found = []
        with contextlib.suppress(FileNotFoundError):  # killed before or while it was made
            found = sorted(hit.metadata["row"] for hit in PromptIndex.open(self.path).rows())
        assert found == list(range(len(found)))
        assert len(found) % self.BATCH == 0
        assert len(found) >= max(self.least, self.read or 0)
        self.least = len(found)
        return self.least == self.rows and self.read is None

    def check_done(self, whole):
        """The same rows and vectors as of a build that nobody killed, and nothing beside them; then anew elsewhere."""
        rows, vectors = contents(self.path)
        assert rows == whole[0]
        assert abs(vectors - whole[1]).max() < 1e-6
        assert not [
            *self.path.rglob("*.partial"),
            *self.path.rglob("feeding.json"),
            *self.folder.glob("*.feeding.json"),
        ]
        self.least, self.path = 0, self.folder / str(int(self.path.name) + 1)


def test_a_build_that_was_killed_goes_on_to_the_same_index(run, encoder, tmp_path):
    build = KilledBuild(tmp_path, encoder, 400)
    assert run(*build.arguments(tmp_path / "whole"))[0] == 0
    process = build.start()
    while process.is_alive() and not build.read:
        time.sleep(0.005)
    process.kill()
    process.join()
    assert not build.check_killed()
    assert build.least > 0
    process = build.start()
    process.join()
    assert process.exitcode == 0
    build.check_done(contents(tmp_path / "whole"))


@pytest.mark.slow
def test_after_kill_9_at_50_random_moments_nothing_is_lost_or_half_there(run, encoder, tmp_path):
    build, moments = KilledBuild(tmp_path, encoder, 2000), random.Random(0)
    assert run(*build.arguments(tmp_path / "whole"))[0] == 0
    whole, kills = contents(tmp_path / "whole"), []
    while len(kills) < 50 or build.least:
        process = build.start()
        if len(kills) % 4 == 0:  # before its first row, mostly
            process.join(moments.uniform(0, 2))
        else:  # a moment of the feeding, whatever else the machine does
            reached = moments.randint(min(build.least + 1, build.rows), build.rows)
            while process.is_alive() and (build.read or 0) < reached:
                time.sleep(0.001)
            process.join(moments.uniform(0, 0.05))
        if len(kills) < 50:
            process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            done = build.check_killed()
            kills.append(build.least)
        else:
            assert process.exitcode == 0
            done = True
        if done:
            build.check_done(whole)
    print(f"killed {len(kills)} times, with so many rows there: {kills}")
    assert len({rows for rows in kills if 0 < rows < build.rows}) > 10


def test_pictures_become_rows_with_thumbnails(run, encoder, tmp_path):
    (tmp_path / "made").mkdir()
    for number, (texts, _) in enumerate(TOOLS.values()):
        write_png(tmp_path / "made" / f"{number}.png", texts)
    assert run("index", "build", "idx", "made", "--encoder", encoder, "--thumbnails", 16)[0] == 0
    (hit,) = json.loads(run("search", "teapot", "-i", "idx", "--filter", "tool=invokeai", "-k", 1, "--json")[1])
    assert hit["text"] == "a copper teapot"
    (row,) = PromptIndex.open("idx").get([hit["id"]])
    assert row.image.size == (16, 12)


@pytest.fixture
def drawn(tmp_path):
    """Pictures of three things by the reference model's artwork, without a prompt, by what they are."""
    (tmp_path / "drawn").mkdir()
    files = {}
    for hit in open_reference_index().rows({"style": "noto", "concept": ["violin", "boar", "jeans"]}):
        name = hit.metadata["concept"]
        files[name] = tmp_path / "drawn" / f"{name}.png"
        hit.image.save(files[name])
    return files


def test_pictures_find_prompts_with_the_reference_encoders(run, rows, encoder, drawn, tmp_path):
    (tmp_path / "names.txt").write_text("jeans\nwhale\nviolin\nboar\nspider web\n")
    assert run("index", "build", "idx", "names.txt", "--encoder", "native")[0] == 0
    run("index", "build", "other", "names.txt", "--encoder", encoder)
    assert run("index", "rebuild", "other", "new", "--encoder", "native")[0] == 0
    assert run("index", "add", "idx", rows)[0] == 0
    for name, file in drawn.items():
        for index in ("idx", "new"):
            (hit,) = json.loads(run("search", "--image", file, "-i", index, "-k", 1, "--json")[1])
            assert hit["text"] == name
    (hit,) = json.loads(run("search", "--image", drawn["violin"], "-k", 1, "--json")[1])
    assert hit["metadata"]["concept"] == "violin"


def test_prompts_find_pictures_that_have_none(run, drawn):
    assert run("index", "build", "idx", "drawn")[:2] == (0, "idx: 3 rows added, 0 were there already\n")
    for name in drawn:
        (hit,) = json.loads(run("search", name, "-i", "idx", "-k", 1, "--json")[1])
        (row,) = PromptIndex.open("idx").get([hit["id"]])
        assert (row.text, row.image.size) == ("", (96, 96))
        assert row.metadata["path"].endswith(f"{name}.png")


def test_rebuild_makes_an_index_of_another_encoder(run, built, tmp_path):
    model, tokenizer = backbone("bert", width=48, seed=1)
    TextEncoder(model, tokenizer).save_pretrained(tmp_path / "other")
    assert run("index", "rebuild", built, "new", "--encoder", "other")[:2] == (0, "new: 3 rows\n")
    assert json.loads(run("index", "stats", "new", "--json")[1])["dim"] == 48
    assert "a red fox" in run("search", "a red fox in the snow", "-i", "new", "-k", 1)[1]


def test_search_prints_json_with_ranks(run, built):
    code, out, _ = run("search", "a red fox in the snow", "-i", built, "--json")
    assert code == 0
    hits = json.loads(out)
    assert list(hits[0]) == ["id", "score", "dense_rank", "lexical_rank", "text", "metadata"]
    assert (hits[0]["text"], hits[0]["dense_rank"], hits[0]["lexical_rank"]) == (ROWS[0]["text"], 1, 1)
    assert hits[0]["metadata"] == {"style": "noto", "steps": 20}
    (hit,) = json.loads(run("search", "狐", "-i", built, "--mode", "lexical", "--json")[1])
    assert (hit["text"], hit["dense_rank"]) == (ROWS[2]["text"], None)


@pytest.mark.parametrize(
    ("filters", "places"),
    [
        (["style=noto"], {0, 1}),
        (["style=noto", "steps>=30"], {1}),
        (["steps=20", "steps=50"], {0, 2}),
        (["steps>20", "steps<50"], {1}),
        (["style=none"], set()),
    ],
)
def test_search_obeys_filters(run, built, filters, places):
    options = [option for text in filters for option in ("--filter", text)]
    hits = json.loads(run("search", "fox", "-i", built, "--mode", "dense", *options, "--json")[1])
    assert {hit["text"] for hit in hits} == {ROWS[place]["text"] for place in places}


def test_a_search_that_finds_nothing_says_so(run, built):
    assert run("search", "fox", "-i", built, "--filter", "style=oil") == (0, "", "textcond: nothing found\n")
    assert run("search", "fox", "-i", built, "--filter", "style=oil", "--json")[:2] == (0, "[]\n")


def test_filters_are_read_as_values_lists_and_bounds():
    given = ["a=1", "b=x y", "c=true", 'd="7"', "e=1", "e=2", "e=3", "f>=1", "f<2.5", "g=", "h=a=b", "i=null", "j=NaN"]
    told = {"a": 1, "b": "x y", "c": True, "d": "7", "e": [1, 2, 3], "f": {"gte": 1, "lt": 2.5}, "g": "", "h": "a=b"}
    assert parse_filters(given) == told | {"i": "null", "j": "NaN"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["  "], 1, "the query is empty"),
        ([], 2, "pass either a QUERY, or a picture with --image"),
        (["fox", "--image", "a.png"], 2, "pass either"),
        (["fox", "--filter", "style"], 1, "filter 'style' is not KEY=VALUE"),
        (["fox", "--filter", "a=1", "--filter", "a>2"], 1, "both a value and a bound"),
        (["fox", "--filter", "steps!=20"], 1, "filter 'steps!=20' is not KEY=VALUE"),
        (["fox", "--filter", "steps==20"], 1, "filter 'steps==20' is not KEY=VALUE"),
        (["fox", "--filter", "a>=1", "--filter", "a>=2"], 1, "filters on 'a' give >= twice"),
        (["fox", "--filter", "steps>true"], 1, "compares with a truth value"),
        (["fox", "--mode", "fuzzy"], 1, "mode 'fuzzy' is unknown"),
        (["--image", "none.png"], 1, "none.png"),
        (["--image", "bad.png"], 1, "bad.png is not a readable"),
        (["--image", "good.png"], 1, "reads no pictures"),
        (["x" * 2_000_000], 1, ""),
    ],
)
def test_a_search_that_cannot_be_made_says_why_in_a_line(run, built, tmp_path, arguments, code, message):
    (tmp_path / "bad.png").write_bytes(b"bad")
    picture().save(tmp_path / "good.png")
    told = run("search", *arguments, "-i", built)
    assert told[:2] == (code, "")
    assert message in " ".join(told[2].split())
    if code == 1:
        assert told[2].startswith("textcond: error: ")
        assert told[2].count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["add", "none", "rows.jsonl"], "there is no index at none"),
        (["stats", "none"], "there is no index at none"),
        (["build", "idx", "none.jsonl"], "none.jsonl"),
        (["build", "rows.jsonl", "rows.jsonl", "--encoder", "none"], "'none' is neither a folder"),
    ],
)
def test_what_is_not_there_is_named_and_nothing_is_made(run, rows, tmp_path, arguments, message):
    code, out, err = run("index", *arguments)
    assert (code, out) == (1, "")
    assert message in err
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl"}


def test_the_table_shows_ranks_text_as_it_is_and_pictures():
    hits = [Hit("1", 0.9, "a [red] fox\x1b[2J", {"seed": 5}, 1, None), Hit("2", 0.5, "a dog", {}, None, 2)]
    hits[0].image = picture((40, 20), "red")
    hits[1].image = None
    console = Console(width=120, record=True, force_terminal=True, color_system="truecolor", file=io.StringIO())
    console.print(hits_table(hits, pictures=True))
    styled = console.export_text(clear=False, styles=True)
    plain = console.export_text()
    assert "a [red] fox [2J" in plain
    assert "\x1b[2J" not in styled
    assert "seed: 5" in plain
    assert "38;2;255;0;0;48;2;255;0;0m▀" in styled
    console.print(hits_table(hits, pictures=False))
    assert "▀" not in console.export_text()


def test_demo_adds_modifiers_to_the_reference_captions(run, encoder, tmp_path, monkeypatch, demo):
    import textcond.pipelines.reference

    monkeypatch.setattr(textcond.pipelines.reference, "open_reference_index", lambda: PromptIndex.open(demo.index))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    lists = {
        "artists": "Ivan A\n",
        "flavors": "volumetric light\nby x\n",
        "mediums": "a photo\n",
        "movements": "baroque\n",
    }
    with zipfile.ZipFile(tmp_path / "clip_interrogator-0.6.0-py3-none-any.whl", "w") as wheel:
        for name, text in lists.items():
            wheel.writestr(f"clip_interrogator/data/{name}.txt", text)
    code, out, err = run("index", "demo", "idx", "--packages", tmp_path / "none", "--encoder", encoder)
    assert (code, out) == (1, "")
    assert "pip download --no-deps clip-interrogator==0.6.0" in err
    assert not (tmp_path / "idx").exists()
    assert run("index", "demo", "idx", "--packages", tmp_path, "--encoder", encoder)[0] == 0
    hits = list(PromptIndex.open("idx").rows())
    assert {hit.text for hit in hits if "list" in hit.metadata} == {"volumetric light", "a photo", "baroque"}
    assert {hit.text for hit in PromptIndex.open(demo.index).rows()} <= {hit.text for hit in hits}
    assert any(hit.image for hit in hits)


def test_a_large_index_is_optimized_when_it_was_made(run, tmp_path, monkeypatch):
    monkeypatch.setattr("textcond.apps.index.SETTLED", 3)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    text_encoder().save_pretrained(tmp_path / "encoder")
    code, _, err = run("index", "build", "big", "rows.jsonl", "-e", "encoder", "--batch-size", "1")
    assert code == 0, err
    assert "making it fast to search" in err
    assert json.loads(run("index", "stats", "big", "--json")[1])["pieces"] == 1
