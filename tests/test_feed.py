import csv
import datetime
import gzip
import json
import os
import subprocess
import sys
from collections import Counter

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from pictures import TOOLS, WEB_UI, picture, raw_png, unicode_comment, write_exif, write_png
from tiny import text_encoder

from textcond import PromptIndex, TextEncoder
from textcond.index.feed import feed
from textcond.index.modifiers import prompt_modifiers

PROMPTS = ["a red fox", "ein roter Fuchs", "赤い狐 🦊", 'quotes "and", commas']


@pytest.fixture(scope="module")
def encoder():
    return text_encoder()


@pytest.fixture
def index(encoder):
    return PromptIndex(encoder)


def rows_of(index):
    return sorted((hit.text, hit.metadata) for hit in index.rows())


def write_table(path, rows):
    """A table of dicts in the form that its name tells."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8", newline="") as file:
        if name.endswith(".jsonl"):
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        elif name.endswith(".json"):
            json.dump(rows, file, indent=1)
        elif name.endswith(".csv"):
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        elif name.endswith(".tsv"):
            file.writelines("\t".join(cells) + "\n" for cells in [rows[0].keys(), *(row.values() for row in rows)])
        else:
            file.writelines(f"{row['text']}\n\n" for row in rows)
    return path


KINDS = ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.tsv", "a.parquet"]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_its_texts_and_a_second_time_adds_nothing(tmp_path, index, name):
    path = write_table(tmp_path / name, [{"text": text, "style": "noto"} for text in PROMPTS])
    report = feed(index, path, batch_size=3)
    assert (report.read, report.added, report.skipped) == (4, 4, 0)
    metadata = {} if ".txt" in name else {"style": "noto"}
    assert rows_of(index) == sorted((text, metadata) for text in PROMPTS)
    report = feed(index, path)
    assert (report.read, report.added, len(index)) == (4, 0, 4)


def test_a_datasets_folder_gives_texts_metadata_and_pictures(tmp_path, index):
    rows = {"caption": PROMPTS[:2], "image": [picture(), None], "likes": [3, 4]}
    features = datasets.Features(
        {"caption": datasets.Value("string"), "image": datasets.Image(), "likes": datasets.Value("int32")}
    )
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features=features)}).save_to_disk(tmp_path / "d")
    assert feed(index, tmp_path / "d").added == 2
    hits = {hit.text: hit for hit in index.rows()}
    assert hits[PROMPTS[0]].metadata == {"likes": 3}
    assert hits[PROMPTS[0]].image.size == (64, 48)
    assert hits[PROMPTS[1]].image is None
    with pytest.raises(ValueError, match="no split 'test'"):
        feed(index, tmp_path / "d", split="test")


def test_metadata_are_json_and_pictures_are_found_beside_the_table(tmp_path, index):
    write_png(tmp_path / "fox.png", {})
    when = datetime.datetime(2024, 5, 1, 12, tzinfo=datetime.timezone.utc)
    row = {"prompt": "a fox", "file_name": "fox.png", "when": when, "raw": b"1", "score": float("nan"), "tags": ["a"]}
    write_table(tmp_path / "a.parquet", [row, row | {"prompt": "a dog", "file_name": "none.png"}])
    assert feed(index, tmp_path / "a.parquet").added == 2
    hits = {hit.text: hit for hit in index.rows()}
    kept = {"when": "2024-05-01T12:00:00+00:00", "tags": ["a"]}
    assert hits["a fox"].metadata == {"file_name": "fox.png"} | kept
    assert (hits["a fox"].image.size, hits["a dog"].image) == ((64, 48), None)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_plain_numbers_and_truth_values_of_untyped_tables_are_no_texts(tmp_path, index, name):
    cells = {
        "steps": "20",
        "cfg": "-7.50",
        "top": str(2**63 - 1),
        "low": str(-(2**63)),
        "safe": "true",
        "tiled": "false",
    }
    texts = {"id": "007", "hash": "1e5", "large": str(2**63), "space": " 5", "sum": "+5", "name": "True", "none": ""}
    texts |= {"point": "5.", "nan": "NaN", "digits": "٣", "long": "1" * 5000}
    path = write_table(
        tmp_path / name, [{"text": "20"} | cells | texts, {"text": "a fox"} | cells | {"steps": "5"} | texts]
    )
    feed(index, path)
    values = {"steps": 20, "cfg": -7.5, "top": 2**63 - 1, "low": -(2**63), "safe": True, "tiled": False}
    (hit,) = index.rows({"steps": {"gte": 20}})
    assert (hit.text, json.dumps(hit.metadata)) == ("20", json.dumps(values | texts, sort_keys=True))


def test_rows_that_begin_with_an_object_are_no_part_of_diffusion_db(tmp_path, index):
    row = {"meta": {"seed": 1, "p": 0.9}, "text": "a fox"}
    (tmp_path / "a.json").write_text(json.dumps(row) + "\n" + json.dumps(row | {"text": "a dog"}) + "\n")
    assert feed(index, tmp_path / "a.json").added == 2
    (tmp_path / "part.json").write_text(json.dumps({"no-suffix": {"se": 3, "p": "a cat"}, "other": {"p": "a boar"}}))
    assert feed(index, tmp_path / "part.json").added == 2
    assert {hit.text for hit in index.rows()} == {"a fox", "a dog", "a cat", "a boar"}


def test_diffusion_db_comes_under_our_names_without_persons(tmp_path, index):
    row = {"image_name": "1.png", "prompt": "a fox", "part_id": 7, "seed": 5, "step": 50, "cfg": 7.0, "sampler": 8}
    row |= {"width": 512, "height": 640, "user_name": "c2f2", "timestamp": None, "image_nsfw": 0.25, "prompt_nsfw": 0.5}
    write_table(tmp_path / "metadata.parquet", [row])
    feed(index, tmp_path / "metadata.parquet")
    ours = {"seed": 5, "num_inference_steps": 50, "guidance_scale": 7.0, "scheduler": "k_lms"}
    rest = {"width": 512, "height": 640, "image_name": "1.png", "part_id": 7, "image_nsfw": 0.25, "prompt_nsfw": 0.5}
    assert rows_of(index) == [("a fox", ours | rest)]

    picture().save(tmp_path / "2.png")
    part = {"2.png": {"p": "a dog", "se": 6, "c": 12.0, "st": 25, "sa": "k_euler"}, "3.png": 5}
    (tmp_path / "part-000001.json").write_text(json.dumps(part, indent=2))
    feed(index, tmp_path / "part-000001.json")
    (hit,) = [hit for hit in index.rows() if hit.text == "a dog"]
    ours = {"seed": 6, "num_inference_steps": 25, "guidance_scale": 12.0, "scheduler": "k_euler"}
    assert hit.metadata == ours | {"image_name": "2.png"}
    assert hit.image.size == (64, 48)


def test_a_folder_of_pictures_gives_prompts_settings_and_thumbnails(tmp_path, index):
    (tmp_path / "deep").mkdir()
    for number, (texts, _) in enumerate(TOOLS.values()):
        write_png(tmp_path / "deep" / f"{number}.png", texts, size=(640, 320))
    write_exif(tmp_path / "a.JPG", unicode_comment(WEB_UI))
    picture().save(tmp_path / "captioned.png")
    (tmp_path / "captioned.txt").write_text("a caption\n")
    picture().save(tmp_path / "bare.png")
    (tmp_path / "broken.webp").write_bytes(b"RIFF")
    (tmp_path / ".hidden.png").write_bytes(b"")
    report = feed(index, tmp_path)
    assert (report.added, report.skipped) == (len(TOOLS) + 2, 2)
    assert set(report.reasons) == {"carries no prompt", "is not a readable PNG, JPEG, WebP, GIF, BMP or TIFF picture"}
    assert "bare.png:1: carries no prompt" in report.first
    hits = {(hit.text, hit.metadata["tool"]): hit for hit in index.rows()}
    fox = hits[TOOLS["comfyui"][1], "comfyui"]
    assert fox.image.size == (256, 128)
    assert fox.metadata == {
        "negative_prompt": "text, watermark",
        "seed": 156680208700286,
        "num_inference_steps": 20,
        "guidance_scale": 8.0,
        "scheduler": "euler",
        "width": 512,
        "height": 640,
        "pipeline": "sd15.safetensors",
        "tool": "comfyui",
        "path": str(tmp_path / "deep" / "1.png"),
    }
    assert ("a caption", "caption file") in hits
    assert feed(index, tmp_path).added == 0
    small = PromptIndex(index.encoder)
    feed(small, tmp_path / "deep", thumbnails=0)
    assert {hit.image for hit in small.rows()} == {None}


def test_distinct_keeps_one_row_a_text(tmp_path, index):
    rows = [{"text": "a red fox", "seed": 1}, {"text": "A  Red FOX ", "seed": 2}, {"text": "a dog", "seed": 1}]
    path = write_table(tmp_path / "a.jsonl", rows)
    assert feed(index, path, distinct=True).added == 2
    assert rows_of(index) == [("a dog", {"seed": 1}), ("a red fox", {"seed": 1})]
    plain = PromptIndex(index.encoder)
    assert feed(plain, path).added == 3


def test_an_encoder_of_pictures_takes_pictures_without_a_prompt(tmp_path, encoder):
    class Both(TextEncoder):
        def encode_image(self, images):
            return self.encode([str(image.size) for image in images])

    both = Both.__new__(Both)
    both.__dict__ = encoder.__dict__
    index = PromptIndex(both)
    picture().save(tmp_path / "bare.png")
    write_png(tmp_path / "told.png", {"parameters": WEB_UI})
    assert feed(index, tmp_path).added == 2
    assert sorted(bool(hit.text) for hit in index.rows()) == [False, True]
    assert feed(index, tmp_path).added == 0


# -- bad input -------------------------------------------------------------------------------------------------------

BAD = {
    "a.jsonl": (
        b'{"text": "a fox"}\n{"text"\n[1]\n{"text": 3}\n{"text": ""}\n{"other": "b"}\n',
        5,
        "a.jsonl:2: not JSON",
    ),
    "a.txt": (b"a fox\n" + b"\xff\xfe\n" + b"x" * 100_001, 2, "a.txt:2: not UTF-8"),
    "a.csv": (b"text,style\na fox,noto\na dog\n", 1, "a.csv:3: 1 fields where the header has 2"),
    "b.jsonl": (b'{"text": "a fox"}\n{"text": "\\ud800"}\n', 1, "b.jsonl:2: the text is not valid Unicode"),
    "c.jsonl": (
        b'{"text": "a fox"}\n{"text": "b", "image": "data:image/png;base64,*"}\n',
        1,
        "c.jsonl:2: the picture is not",
    ),
    "d.jsonl": (b'{"text": "a fox"}\n{"text": "b", "image": "data:image/png;base64,AAAA"}\n', 1, "not a readable"),
    "e.jsonl": (b'{"text": "a fox"}\n{"text": "b", "image": 3}\n', 1, "the picture is a int"),
    "f.jsonl": (b'{"text": "a fox"}\n' + b"[" * 100_000 + b"\n", 1, "f.jsonl:2: "),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_counted_and_the_first_is_an_error_on_request(tmp_path, encoder, name):
    content, bad, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    index = PromptIndex(encoder)
    report = feed(index, tmp_path / name)
    assert (report.added, report.skipped, sum(report.reasons.values())) == (1, bad, bad)
    assert message in report.first
    assert message in str(report)
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        feed(PromptIndex(encoder), tmp_path / name, on_error="raise")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bin", b"", "a.bin is none of .txt, .jsonl"),
        ("a.jsonl", b'{"body": "a"}\n', "no column text or prompt or caption or positive_prompt among body"),
        ("a.parquet", b"PAR1", "not a whole Parquet file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000)[:40], "damaged or cut short"),
        ("a.json", b'{"1.png": {"p": "a"', "is not JSON"),
        ("a.csv", b"text,text\na,b\n", "name every column"),
        ("a.csv", "prompt,seed\na,1\n".encode("utf-16"), "a.csv is not UTF-8: convert it to UTF-8"),
        ("a.csv", "prompt,seed\na,1\n".encode("utf-16-le"), "a.csv is not UTF-8: convert it to UTF-8"),
        ("a.tsv", "prompt\tseed\na\t1\n".encode("utf-16"), "a.tsv is not UTF-8: convert it to UTF-8"),
        ("a.tsv", "prompt\tseed\na\t1\n".encode("utf-16-be"), "a.tsv is not UTF-8: convert it to UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error(tmp_path, index, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        feed(index, tmp_path / name)


def test_a_parquet_file_with_a_damaged_foot_is_named_with_a_progress_bar_too(tmp_path, index):
    path = write_table(tmp_path / "a.parquet", [{"text": text} for text in PROMPTS])
    content = bytearray(path.read_bytes())
    foot = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    content[foot : foot + 8] = b"\xff" * 8
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet is not a whole Parquet file .*: download or write it again"):
        feed(index, path, show_progress_bar=True)


def test_a_missing_source_and_a_folder_without_pictures_are_named(tmp_path, index):
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        feed(index, tmp_path / "none.txt")
    with pytest.raises(FileNotFoundError, match="holds no pictures"):
        feed(index, tmp_path)


def test_a_picture_that_is_gone_is_skipped(tmp_path, index):
    (tmp_path / "gone.png").symlink_to(tmp_path / "none")
    write_png(tmp_path / "fox.png", {"parameters": WEB_UI})
    report = feed(index, tmp_path)
    assert (report.added, report.reasons) == (1, {"cannot be read": 1})


def test_an_empty_file_adds_nothing(tmp_path, index):
    for name in ("a.txt", "a.jsonl", "a.csv"):
        (tmp_path / name).write_bytes(b"")
        assert feed(index, tmp_path / name).read == 0


def test_reasons_stay_few_whatever_files_say(tmp_path, index):
    (tmp_path / "a.jsonl").write_text(
        '{"text": "a"}\n' + "".join(f'{{"k{chr(97 + i % 26)}{i}": 1}}\n' for i in range(500))
    )
    report = feed(index, tmp_path / "a.jsonl")
    assert report.skipped == 500
    assert len(report.reasons) < 60


# -- stopping and going on -------------------------------------------------------------------------------------------


def test_a_stopped_feed_goes_on_where_its_mark_says(tmp_path, encoder, monkeypatch):
    path = write_table(tmp_path / "a.jsonl", [{"text": f"prompt {number}"} for number in range(50)])
    index, mark = PromptIndex(encoder), tmp_path / "mark.json"
    encode, calls = encoder.encode, Counter()

    def failing(texts, **options):
        calls["batches"] += 1
        calls["texts"] += len(texts)
        if calls["batches"] == 4:
            raise KeyboardInterrupt
        return encode(texts, **options)

    monkeypatch.setattr(encoder, "encode", failing)
    with pytest.raises(KeyboardInterrupt):
        feed(index, path, batch_size=10, mark=mark)
    assert len(index) == 30
    assert mark.is_file()
    report = feed(index, path, batch_size=10, mark=mark)
    assert (report.read, report.added, len(index)) == (20, 20, 50)
    assert not mark.exists()
    assert calls["texts"] == 60


def test_progress_tells_how_many_of_all_rows_are_done(tmp_path, index, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a fox"}\n{"text": 3}\n{"text": "a dog"}\n')
    feed(index, path, show_progress_bar=True)
    assert "3/3" in capsys.readouterr().err


def one_line(path, rows):
    path.write_text(json.dumps(rows))


def part(path, rows):
    path.write_text(json.dumps({f"{place}.png": {"p": row["text"]} for place, row in enumerate(rows)}))


def saved_dataset(path, rows):
    datasets.Dataset.from_list(rows).save_to_disk(path)


WRITERS = {"a.json": one_line, "part-000001.json": part, "folder": saved_dataset} | dict.fromkeys(KINDS, write_table)


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_is_counted_and_goes_on_where_it_stopped(tmp_path, index, name, capsys, monkeypatch):
    WRITERS[name](tmp_path / name, [{"text": f'the "text": {row}', "style": "noto"} for row in range(9)])
    add = PromptIndex.add

    def stopped(index, *arguments, **options):
        if len(index) == 4:
            raise KeyboardInterrupt
        return add(index, *arguments, **options)

    monkeypatch.setattr(PromptIndex, "add", stopped)
    with pytest.raises(KeyboardInterrupt):
        feed(index, tmp_path / name, batch_size=2, mark=tmp_path / "mark")
    monkeypatch.undo()
    capsys.readouterr()
    feed(index, tmp_path / name, batch_size=2, mark=tmp_path / "mark", show_progress_bar=True)
    assert len(index) == 9
    if name not in ("a.txt", "a.txt.gz", "a.csv", "a.tsv"):  # whose blank lines or header are counted, too
        shown = capsys.readouterr().err
        assert "4/9" in shown
        assert "9/9" in shown


def test_a_mark_does_not_hide_what_changed(tmp_path, index):
    path = write_table(tmp_path / "a.jsonl", [{"text": "a fox"}])
    size, time_ns = path.stat().st_size, path.stat().st_mtime_ns
    mark = tmp_path / "mark.json"
    mark.write_text(json.dumps({"rows": {str(path): [size, time_ns, 1]}}))
    assert feed(index, path, mark=mark).read == 0
    mark.write_text(json.dumps({"rows": {str(path): [size, time_ns - 1, 1]}}))
    assert feed(index, path, mark=mark).added == 1
    mark.write_text(json.dumps({"rows": {str(path): [size, time_ns, 1]}}))
    assert feed(index, path, mark=mark, distinct=True).read == 1  # another kind of feed


@pytest.fixture
def killed(monkeypatch):
    """Feeds that end as a process does that is killed before its second batch of two."""

    def run(index, *arguments, **options):
        add, calls = PromptIndex.add, Counter()

        def stopped(*given, **told):
            calls["batches"] += 1
            if calls["batches"] == 2:
                raise KeyboardInterrupt
            return add(*given, **told)

        monkeypatch.setattr(PromptIndex, "add", stopped)
        with pytest.raises(KeyboardInterrupt):
            feed(index, *arguments, batch_size=2, **options)
        monkeypatch.setattr(PromptIndex, "add", add)

    return run


OTHER_OPTIONS = [
    ({"text_column": "prompt"}, {"text_column": "caption"}),
    ({"text_column": "caption"}, {}),
    ({"split": "train"}, {"split": "test"}),
    ({"thumbnails": 256}, {"thumbnails": 0}),
]


@pytest.mark.parametrize(("first", "then"), OTHER_OPTIONS)
def test_a_mark_hides_no_row_from_a_feed_with_other_options(tmp_path, index, killed, first, then):
    rows = [{"prompt": f"prompt {row}", "caption": f"caption {row}"} for row in range(6)]
    splits = {name: datasets.Dataset.from_list(rows) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    mark = tmp_path / "mark"
    killed(index, tmp_path / "set", mark=mark, **first)
    assert feed(index, tmp_path / "set", mark=mark, **then).read == 6
    assert feed(index, tmp_path / "set", mark=mark, **first).read == 4
    assert not mark.exists()


@pytest.mark.parametrize("unfinished", ["a.jsonl", "pictures"])
def test_a_finished_feed_leaves_the_mark_of_another_source(tmp_path, index, killed, unfinished):
    write_table(tmp_path / "a.jsonl", [{"text": f"prompt {row}"} for row in range(6)])
    (tmp_path / "pictures").mkdir()
    for number in range(6):
        write_png(tmp_path / "pictures" / f"{number}.png", {"parameters": WEB_UI})
    (tmp_path / "other.txt").write_text("a dog\n")
    mark = tmp_path / "mark"
    killed(index, tmp_path / unfinished, mark=mark)
    assert feed(index, tmp_path / "other.txt", mark=mark).added == 1
    assert mark.is_file()
    report = feed(index, tmp_path / unfinished, mark=mark)
    assert (report.read, report.added) == (4 if unfinished == "a.jsonl" else 6, 4)
    assert not mark.exists()


def test_a_source_without_a_usable_row_leaves_no_mark(tmp_path, index):
    path = write_table(tmp_path / "a.jsonl", [{"body": "a fox"}])
    with pytest.raises(ValueError, match="no column"):
        feed(index, path, mark=tmp_path / "mark")
    assert not (tmp_path / "mark").exists()


LAUNCHED = """
import sys
from textcond import PromptIndex, TextEncoder
from textcond.index.feed import feed, help_feed, is_first_process
index, source, encoder = sys.argv[1:]
if is_first_process():
    made = PromptIndex.create(index, TextEncoder.from_pretrained(encoder))
    print(feed(made, source, batch_size=17).added, flush=True)
else:
    help_feed()
"""


@pytest.mark.slow
def test_processes_share_the_encoding_and_give_the_same_index(tmp_path, encoder):
    encoder.save_pretrained(tmp_path / "encoder")
    encoder = TextEncoder.from_pretrained(tmp_path / "encoder")
    source = write_table(tmp_path / "a.jsonl", [{"text": f"prompt {number}"} for number in range(100)])
    (tmp_path / "launched.py").write_text(LAUNCHED)
    arguments = [str(tmp_path / "launched.py"), str(tmp_path / "index"), str(source), str(tmp_path / "encoder")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launch, *arguments], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["100"]
    index, alone = PromptIndex.open(tmp_path / "index"), PromptIndex(encoder)
    feed(alone, source)
    for query in ("prompt 7", "prompt 99"):
        found = [
            [(hit.id, round(hit.score, 3)) for hit in one.search(query, k=5, mode="dense")] for one in (index, alone)
        ]
        assert found[0] == found[1]


# -- modifiers -------------------------------------------------------------------------------------------------------


def test_modifiers_come_without_artists_and_unsafe_lines(tmp_path):
    import zipfile

    lists = {
        "artists": "Ivan Aivazovsky\nFrederic Church\n",
        "flavors": "volumetric light\nby ivan aivazovsky\nivan aivazovsky\nan aivazovsky sea\nnude\nchurch\nart by x\n",
        "mediums": "an oil painting\n",
        "movements": "baroque\n",
    }
    with pytest.raises(FileNotFoundError, match="pip download --no-deps clip-interrogator"):
        prompt_modifiers(tmp_path)
    with zipfile.ZipFile(tmp_path / "clip_interrogator-0.6.0-py3-none-any.whl", "w") as wheel:
        for name, text in lists.items():
            wheel.writestr(f"clip_interrogator/data/{name}.txt", text)
    found = prompt_modifiers(tmp_path)
    assert found["flavors"] == ["volumetric light", "an aivazovsky sea", "church"]
    assert (found["mediums"], found["movements"]) == (["an oil painting"], ["baroque"])
    assert "an aivazovsky sea" not in prompt_modifiers(tmp_path, last_names=True)["flavors"]


def test_a_picture_bomb_in_a_folder_is_skipped(tmp_path, index):
    (tmp_path / "bomb.png").write_bytes(raw_png(width=60_000, height=60_000))
    write_png(tmp_path / "fox.png", {"parameters": WEB_UI})
    report = feed(index, tmp_path)
    assert (report.added, report.skipped) == (1, 1)
