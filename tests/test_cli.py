import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from tiny_reference import PROMPTS

from textcond import TextEncoder
from textcond.apps.cli import main
from textcond.apps.metadata import read_parameters
from textcond.pipelines.reference.multilingual import MultilingualRecipe

COMMAND = [sys.executable, "-m", "textcond.apps.cli"]


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


@pytest.fixture
def generate(run, demo):
    """`textcond generate` on the tiny pipeline, in two steps."""
    return lambda *arguments: run("generate", "--pipeline", demo.pipeline, "--steps", 2, *arguments)


def _pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def _is_one_error_line(err):
    return err.startswith("textcond: error: ") and err.count("\n") == 1


def test_help_and_version_come_without_the_heavy_libraries():
    code = "import sys, textcond.apps.cli; print([name for name in ('torch', 'gradio') if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"


def test_help_names_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    for name in ("generate", "search", "inspect", "encode", "studio", "reference"):
        assert name in out
    assert run("--version")[1].startswith("textcond 0.")


def test_a_picture_is_written_with_everything_that_made_it(generate, tmp_path, demo):
    code, out, _ = generate("a red fox", "-o", "a.png", "--seed", 7, "--negative", "snow", "--guidance", 3)
    assert (code, out) == (0, "a.png\n")
    made = read_parameters(tmp_path / "a.png")
    assert (made.prompt, made.negative_prompt, made.seed, made.guidance_scale) == ("a red fox", "snow", 7, 3.0)
    assert (made.num_inference_steps, made.width, made.pipeline, made.encoder) == (2, 128, demo.pipeline, "native")
    chunks = Image.open(tmp_path / "a.png").text
    assert chunks["parameters"].startswith("a red fox\nNegative prompt: snow\nSteps: 2, Sampler: DDIM, CFG scale: 3.0")
    assert json.loads(chunks["textcond"])["seed"] == 7


def test_each_of_several_pictures_can_be_made_again_alone(generate, run, tmp_path):
    code, out, _ = generate("a red fox", "-o", "many.png", "--seed", 7, "--count", 3)
    assert (code, out) == (0, "many-0.png\nmany-1.png\nmany-2.png\n")
    assert [read_parameters(tmp_path / f"many-{number}.png").seed for number in range(3)] == [7, 8, 9]
    assert run("generate", "--like", "many-2.png", "-o", "again.png")[0] == 0
    np.testing.assert_array_equal(_pixels("again.png"), _pixels("many-2.png"))
    assert read_parameters("again.png") == read_parameters("many-2.png")


def test_options_change_what_a_picture_is_made_like(generate, run):
    generate("a red fox", "-o", "a.png", "--seed", 7)
    run("generate", "a blue fox", "--like", "a.png", "-o", "b.png", "--guidance", 2)
    was, now = read_parameters("a.png"), read_parameters("b.png")
    assert now == replace(was, prompt="a blue fox", guidance_scale=2.0)


def test_another_encoder_makes_another_picture_and_is_recorded(generate, demo):
    generate("a red fox", "-o", "a.png", "--seed", 7)
    code, *_ = generate("a red fox", "-o", "b.png", "--seed", 7, "--encoder", demo.encoder)
    assert code == 0
    assert read_parameters("b.png").encoder == demo.encoder
    assert (_pixels("a.png") != _pixels("b.png")).any()


def test_the_reference_model_reads_many_languages_unless_its_own_encoder_is_asked_for(run, demo):
    few = ("--steps", 1, "--seed", 7)
    assert run("generate", "赤リンゴ", "-o", "a.png", *few)[0] == 0
    run("generate", "赤リンゴ", "-o", "b.png", *few, "--encoder", "native")
    assert [read_parameters(name).encoder for name in ("a.png", "b.png")] == ["multilingual", "native"]
    assert (_pixels("a.png") != _pixels("b.png")).any()
    assert run("generate", "--like", "a.png", "-o", "c.png", "--pipeline", demo.pipeline)[0] == 0
    assert read_parameters("c.png").encoder == "native"


def test_a_random_seed_is_recorded_and_told(generate):
    _, _, err = generate("fox", "-o", "a.png")
    assert f"seed {read_parameters('a.png').seed}," in err


@pytest.mark.parametrize("prompt", ["", "🍎🦊", "ثعلب أحمر"], ids=["empty", "emoji", "arabic"])
def test_any_prompt_makes_a_picture(generate, prompt):
    code, _, err = generate(prompt, "-o", "a.png")
    assert code == 0
    assert "left out" not in err
    assert read_parameters("a.png").prompt == prompt


def test_a_long_prompt_is_read_up_to_the_limit_and_that_is_told(generate):
    code, _, err = generate("fox " * 10_000, "-o", "a.png")
    assert code == 0
    assert "textcond: prompt: 30,000 tokens, of which the encoder reads the first 30" in err
    assert len(err.splitlines()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "none/a.png"], "does not exist: make it first"),
        (["-o", "a.jpg"], "end it in .png"),
        (["-o", "."], ".png"),
        (["-o", "folder.png"], "is a folder: name a file in it"),
        (["--pipeline", "nothing"], "there is no pipeline folder nothing"),
        (["--encoder", "nothing"], "there is no encoder folder nothing"),
        (["--encoder", "{wide}"], "48-wide tokens, the UNet expects 32"),
        (["--width", "65"], "divisible by 8"),
        (["--device", "nowhere"], "device 'nowhere' cannot be used here"),
        (["--dtype", "int8"], "dtype 'int8' is unknown"),
        (["--like", "none.png"], "no image file none.png"),
        (["--like", "text.png"], "not a readable PNG"),
    ],
)
def test_bad_input_is_one_line_that_names_the_value(generate, demo, tmp_path, options, message):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "text.png").write_text("text")
    code, out, err = generate("fox", *(option.format(wide=demo.wide) for option in options))
    assert (code, out) == (1, "")
    assert _is_one_error_line(err)
    assert message in err
    assert sorted(os.listdir(tmp_path)) == ["folder.png", "text.png"]


def test_the_output_is_checked_before_the_pipeline_is_looked_at(run):
    code, _, err = run("generate", "fox", "--pipeline", "nothing", "-o", "none/a.png")
    assert code == 1
    assert "none" in err
    assert "nothing" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate"],
        ["generate", "fox", "--steps", "0"],
        ["generate", "fox", "--seed", "-1"],
        ["generate", "fox", "--count", "0"],
        ["generate", "fox", "--colour", "red"],
        ["encode"],
        ["encode", "a", "--file", "b.txt"],
        ["encode", "a", "--kind", "poem"],
        ["studio", "--port", "99999"],
        ["draw"],
    ],
)
def test_wrong_usage_ends_with_code_2(run, arguments):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "Usage" in err


def test_a_traceback_is_there_for_who_asks(run, monkeypatch):
    monkeypatch.setenv("TEXTCOND_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(["generate", "fox", "-o", "none/a.png"])


def test_search_shows_the_nearest_prompts(run, demo):
    code, out, _ = run("search", "red fox, noto style", "--index", demo.index, "-k", 3, "--mode", "dense")
    assert code == 0
    assert out.splitlines()[0] == "1.000  red fox, noto style"
    assert len(out.splitlines()) == 3
    _, out, _ = run("search", "blue fox", "--index", demo.index, "-k", 100, "--json")
    hits = json.loads(out)
    assert sorted(hit["text"] for hit in hits) == sorted(PROMPTS)
    assert hits == sorted(hits, key=lambda hit: -hit["score"])
    assert all(PROMPTS[hit["metadata"]["row"]] == hit["text"] for hit in hits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["  "], "the query is empty"), (["fox", "--index", "none"], "there is no index at none")],
)
def test_a_search_that_cannot_be_made_says_why(run, demo, arguments, message):
    code, out, err = run("search", *arguments)
    assert (code, out) == (1, "")
    assert _is_one_error_line(err)
    assert message in err


def test_inspect_shows_the_contract_of_each_slot(run, demo):
    code, out, _ = run("inspect", demo.pipeline)
    assert code == 0
    assert "StableDiffusionPipeline" in out
    assert "text_encoder: CLIPTextModel" in out
    assert "32-wide tokens" in out
    (contract,) = json.loads(run("inspect", demo.pipeline, "--json")[1])
    assert (contract["slot"], contract["token_width"], contract["problems"]) == ("text_encoder", 32, [])


@pytest.mark.parametrize("suffix", ["npy", "safetensors", "jsonl", "stdout"])
def test_encode_writes_the_vectors_of_the_encoder(run, demo, suffix):
    texts = ["red fox", "", "ثعلب أحمر", "🦊"]
    output = [] if suffix == "stdout" else ["-o", f"v.{suffix}"]
    code, out, _ = run("encode", *texts, "--encoder", demo.encoder, *output)
    assert code == 0
    if suffix == "npy":
        vectors = np.load("v.npy")
    elif suffix == "safetensors":
        vectors = load_file("v.safetensors")["vectors"]
    else:
        rows = [json.loads(line) for line in (out if suffix == "stdout" else Path("v.jsonl").read_text()).splitlines()]
        assert [row["text"] for row in rows] == texts
        vectors = [row["vector"] for row in rows]
    np.testing.assert_allclose(vectors, TextEncoder.from_pretrained(demo.encoder).encode(texts), atol=1e-6)


def test_encode_reads_lines_from_a_file_and_from_standard_input(run, demo, tmp_path, monkeypatch):
    lines = [f"text {number}" for number in range(1500)]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    assert run("encode", "--file", "lines.txt", "--encoder", demo.encoder, "-o", "a.npy")[0] == 0
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
    assert run("encode", "-", "--encoder", demo.encoder, "-o", "b.npy")[0] == 0
    np.testing.assert_array_equal(np.load("a.npy"), np.load("b.npy"))
    expected = TextEncoder.from_pretrained(demo.encoder).encode(lines)
    np.testing.assert_allclose(np.load("a.npy"), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "-o", "v.csv"], "end it in .npy"),
        (["a", "-o", "none/v.npy"], "make it first"),
        (["a", "--encoder", "{demo}/none"], "none"),
        (["--file", "none.txt"], "no file none.txt: give a text file"),
        (["--file", "empty.txt"], "there is no text to encode"),
    ],
)
def test_what_cannot_be_encoded_is_told_in_one_line(run, demo, tmp_path, arguments, message):
    (tmp_path / "empty.txt").touch()
    encoder = [] if "--encoder" in arguments else ["--encoder", demo.encoder]
    code, _, err = run("encode", *(argument.format(demo=demo.root) for argument in arguments), *encoder)
    assert code == 1
    assert _is_one_error_line(err)
    assert message in err
    assert os.listdir(tmp_path) == ["empty.txt"]


def test_ctrl_c_ends_with_code_130_and_leaves_nothing(demo, tmp_path):
    arguments = ["encode", "-", "--encoder", demo.encoder, "-o", str(tmp_path / "v.npy")]
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell starts background jobs, such as a test run, deaf to Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not os.listdir(tmp_path):
        assert process.poll() is None
        time.sleep(0.05)
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)  # longer only if the interrupt got lost, as CPython may lose one amid an import
    assert process.returncode in (130, -signal.SIGINT)  # which shells call 130 alike
    assert "Traceback" not in process.stderr.read().split("Exception ignored")[0]
    assert not os.listdir(tmp_path)


def test_a_reader_that_goes_away_is_no_error(demo):
    encode = [*COMMAND, "encode", *(["fox"] * 2000), "--encoder", demo.encoder]
    process = subprocess.Popen(encode, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.wait(60)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "--out", "made", "--stage", "nonsense"], "no stage 'nonsense'"),
        (["build", "--out", "made", "--stage", "judge"], "run stage data first"),
    ],
)
def test_a_reference_stage_that_cannot_run_is_told_in_one_line(run, tmp_path, arguments, message):
    code, _, err = run("reference", *arguments)
    assert code == 1
    assert _is_one_error_line(err)
    assert message in err
    assert os.listdir(tmp_path) == []


def test_the_stages_of_the_multilingual_encoder_take_the_steps_they_are_told(run, tmp_path, monkeypatch):
    asked = {}

    def build(out, stages, **given):
        asked.update(given, stages=stages)

    monkeypatch.setattr("textcond.pipelines.reference.multilingual.build_multilingual", build)
    options = ["--out", "made", "--packages", tmp_path, "--stage", "align", "--token-steps", 700]
    assert run("reference", "multilingual", *options) == (0, "made\n", "")
    assert asked["stages"] == ["align"]
    assert asked["recipe"].align.options.token_steps == 700
    assert asked["recipe"].distil == MultilingualRecipe().distil
