"""`textcond align` and `textcond eval conditioning` as a person runs them."""

import json

import diffusers
import pytest
import tiny_reference
from tiny import stable_diffusion, text_encoder

from textcond.apps.cli import main
from textcond.pipelines import swap_text_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text encoder, prompts in two languages, and one pipeline."""
    root = tmp_path_factory.mktemp("align")
    text_encoder("bert").save_pretrained(root / "encoder")
    lines = [f"{thing} {number}\tein {thing} {number}" for thing in tiny_reference.THINGS for number in range(10)]
    (root / "prompts.txt").write_text("\n".join(lines))
    tiny_reference.save_pipeline(root / "pipeline")
    return root


@pytest.fixture
def run(capsys, monkeypatch, folder):
    """Run the command in the folder; give back its exit code, standard output and standard error."""
    monkeypatch.chdir(folder)

    def call(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main(list(arguments))
        printed = capsys.readouterr()
        return stopped.value.code, printed.out, printed.err

    return call


ALIGN = ("align", "-p", "pipeline", "-e", "encoder", "--prompts", "prompts.txt")
SHORT = ("--token-steps", "4", "--denoiser-steps", "2", "--batch-size", "8", "--denoiser-batch-size", "2")


def test_one_command_makes_a_folder_that_swaps_in_and_a_report_with_pictures(run, folder):
    code, out, err = run(*ALIGN, *SHORT, "--out", "aligned")
    assert code == 0, err
    assert out.strip() == "aligned"
    pipe = tiny_reference.pipeline()
    swap_text_encoder(pipe, folder / "aligned")
    report = (folder / "aligned" / "report" / "report.md").read_text()
    assert "original" in report
    assert "aligned" in report
    assert list((folder / "aligned" / "report").glob("*.png"))
    assert json.loads((folder / "aligned" / "alignment.json").read_text())["token_steps"] == 4
    # what was aligned is compared again, and aligned further
    code, out, err = run("eval", "conditioning", "-p", "pipeline", "-e", "aligned", "--prompts", "prompts.txt",
                         "--out", "again", "--steps", "2", "--limit", "2", "--controls", "shuffled")  # fmt: skip
    assert code == 0, err
    assert "shuffled" in (folder / "again" / "report.md").read_text()
    # a bridge of the same size on the pipeline's own encoder
    native = tuple("native" if word == "encoder" else word for word in ALIGN)
    code, out, err = run(*native, *SHORT, "--dtype", "bfloat16", "--out", "native", "--no-report")
    assert code == 0, err
    code, out, err = run("eval", "conditioning", "-p", "pipeline", "-e", "aligned,native", "--prompts", "prompts.txt",
                         "--out", "all", "--steps", "2", "--limit", "2")  # fmt: skip
    assert code == 0, err
    report = (folder / "all" / "report.md").read_text()
    assert all(f"| {row} |" in report for row in ("original", "raw", "random", "closed_form", "tokens", "native"))
    further = tuple("aligned" if word == "encoder" else word for word in ALIGN)
    code, out, err = run(*further, *SHORT, "--out", "further", "--no-report")
    assert code == 0, err
    assert not (folder / "further" / "report").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--prompts", "gone.txt"), "gone.txt"),
        (("--guidance", "strong"), "--guidance 'strong'"),
        (("--guidance", "0.2,3"), "guidance_scale=0.2,3.0"),
        (("--encoder", "nowhere"), "nowhere"),
        (("--bridge", "bride"), "bride"),
        (("--slot", "text_encoder_9"), "text_encoder_9"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_left_behind(run, folder, changes, message):
    code, _, err = run(*ALIGN, *SHORT, "--out", "bad", *changes)
    assert code == 1
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (folder / "bad" / "config.json").exists()


def test_what_draws_after_a_picture_is_aligned_without_a_report(run, folder):
    pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(stable_diffusion())
    pipe.save_pretrained(folder / "image-to-image")
    given = tuple("image-to-image" if word == "pipeline" else word for word in ALIGN)
    code, _, err = run(*given, *SHORT, "--height", "16", "--width", "16", "--out", "after-pictures")
    assert code == 0, err
    assert "no report: StableDiffusionImg2ImgPipeline draws after a picture" in err
    swap_text_encoder(stable_diffusion(), folder / "after-pictures")


def test_an_encoder_is_reported_through_its_connector_and_may_have_any_name(run, folder):
    code, _, err = run(*ALIGN, *SHORT, "--bridge", "timestep", "--closed-form-prompts", "0", "--out", "raw")
    assert code == 0, err
    assert "aligned" in (folder / "raw" / "report" / "report.md").read_text()
    code, _, err = run("eval", "conditioning", "-p", "pipeline", "-e", "raw,encoder", "--prompts", "prompts.txt",
                       "--out", "again", "--steps", "2", "--limit", "2")  # fmt: skip
    assert code == 1
    assert "an encoder is named 'raw', as a control is" in err
    (folder / "raw").rename(folder / "through")
    code, _, err = run("eval", "conditioning", "-p", "pipeline", "-e", "through", "--prompts", "prompts.txt",
                       "--out", "through-report", "--steps", "2", "--limit", "2")  # fmt: skip
    assert code == 0, err
    assert "random" in (folder / "through-report" / "report.md").read_text()
