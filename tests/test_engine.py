import threading

import numpy as np
import pytest
import tiny
import tiny_families
from PIL import Image
from tiny_reference import PROMPTS

from textcond import PromptIndex, TextEncoder
from textcond.apps.engine import Engine
from textcond.apps.finder import Finder, open_index
from textcond.apps.metadata import NATIVE, Parameters
from textcond.pipelines import TimestepAwareUNet, make_encoder


@pytest.fixture(scope="module")
def engine(demo):
    return Engine(demo.pipeline, demo.index)


def _parameters(engine, encoder=NATIVE, steps=2):
    return Parameters("red fox", seed=1, num_inference_steps=steps, pipeline=engine.name, encoder=encoder)


def test_the_index_serves_the_encoder_that_made_it_without_encoding_again(engine):
    assert engine.finder() is engine.finder(NATIVE)
    assert [hit.text for hit in engine.finder().search("red fox, noto style", 1)] == ["red fox, noto style"]


def test_another_encoder_finds_with_its_own_vectors_and_the_same_pictures(engine, demo):
    finder = engine.finder(demo.encoder)
    assert engine.can_find(demo.encoder)
    assert finder.encoder.weights_hash() == TextEncoder.from_pretrained(demo.encoder).weights_hash()
    (hit,) = finder.search("blue fox, blob style", 1)
    row = PROMPTS.index("blue fox, blob style")
    assert (hit.text, hit.metadata) == ("blue fox, blob style", {"row": row})
    assert hit.image.getpixel((0, 0)) == (30 * row, 80, 120)
    expected = finder.encoder.encode("blue fox") @ finder.encoder.encode(PROMPTS).T
    scores = {hit.metadata["row"]: hit.score for hit in finder.search("blue fox", len(PROMPTS))}
    np.testing.assert_allclose([scores[row] for row in range(len(PROMPTS))], expected, atol=2e-3)


def test_each_encoder_conditions_its_own_pictures_and_the_native_one_returns(engine, demo):
    first = np.asarray(engine.draw(_parameters(engine))[0])
    other = np.asarray(engine.draw(_parameters(engine, demo.encoder))[0])
    again = np.asarray(engine.draw(_parameters(engine))[0])
    assert (first != other).any()
    np.testing.assert_array_equal(first, again)


def test_an_encoder_of_another_width_is_known_before_it_is_swapped_in(engine, demo, tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert Engine(demo.pipeline).may_take(demo.wide)  # what it will read is not known yet
    engine.warm_up()
    choices = (demo.encoder, demo.wide, str(tmp_path), "a/hub-id")
    assert [engine.may_take(encoder) for encoder in choices] == [True, False, True, True]


def test_an_encoder_that_does_not_fit_is_refused_and_breaks_nothing(engine, demo):
    for use in (lambda: engine.draw(_parameters(engine, demo.wide)), lambda: engine.finder(demo.wide)):
        with pytest.raises(ValueError, match="48-wide"):
            use()
    with pytest.raises(FileNotFoundError, match="no encoder folder"):
        engine.draw(_parameters(engine, "nothing"))
    engine.draw(_parameters(engine))
    assert not engine.can_find(demo.wide)


def test_the_first_use_loads_the_pipeline_once(demo):
    engine = Engine(demo.pipeline, demo.index)
    assert not engine.ready
    threads = [threading.Thread(target=engine.warm_up) for _ in range(2)]
    pipes = []
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
        pipes.append(engine._pipe)
    assert engine.ready
    assert pipes[0] is pipes[1]


def test_searching_does_not_wait_for_a_picture(engine):
    engine.finder()
    searched = []

    def on_step(done, total, preview):
        thread = threading.Thread(target=lambda: searched.append(engine.finder().search("red", 1)))
        thread.start()
        thread.join(30)

    engine.draw(_parameters(engine), on_step)
    assert len(searched) == 2


def test_samples_are_different_rows(demo):
    finder = Finder(open_index(demo.index))
    assert sorted(row.text for row in finder.sample(100)) == sorted(PROMPTS)
    assert len({row.id for row in finder.sample(3)}) == 3


def test_an_empty_index_finds_nothing(demo):
    encoder = TextEncoder.from_pretrained(f"{demo.pipeline}/text_encoder")
    for finder in (Finder(PromptIndex(encoder)), Finder(PromptIndex(encoder), encoder)):
        assert (len(finder), finder.search("fox", 3), finder.sample(3)) == (0, [], [])


def test_a_picture_that_several_rows_share_is_found_once(demo):
    index = PromptIndex(TextEncoder.from_pretrained(f"{demo.pipeline}/text_encoder"))
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    index.add(["red fox", "roter Fuchs", "renard rouge"], images=[red] * 3)
    index.add(["blue fox", "zorro azul", "a fox without a picture", "another one"], images=[blue, blue, None, None])
    finder = Finder(index)
    found = finder.search("red fox", 10)
    assert found[0].text == "red fox"
    assert [hit.score for hit in found] == sorted((hit.score for hit in found), reverse=True)
    shown = [hit.image and hit.image.getpixel((0, 0)) for hit in found]
    assert sorted(map(str, shown)) == ["(0, 0, 255)", "(255, 0, 0)", "None", "None"]
    assert {hit.id for hit in finder.search("red fox", 2)} < {hit.id for hit in found}


def test_any_family_of_denoisers_takes_an_encoder(tmp_path):
    pipe = tiny_families.pixart()
    pipe.save_pretrained(tmp_path / "pipeline")
    encoder = make_encoder(pipe, tiny.text_encoder())
    encoder.save_pretrained(tmp_path / "encoder")
    engine = Engine(str(tmp_path / "pipeline"))
    with engine._conditioned(str(tmp_path / "encoder")) as conditioned:
        assert conditioned.text_encoder.config.bridge == "mlp"


def test_an_encoder_brings_its_connector(demo, tmp_path):
    engine = Engine(demo.pipeline, demo.index)
    unet = engine._pipeline().unet
    aware = TimestepAwareUNet.from_unet(unet, 32, tokens=6, depth=1)
    tiny.conditioning(bridge="identity", tokens=40).save_pretrained(tmp_path / "encoder")
    aware.save_connector(tmp_path / "encoder" / "connector.safetensors")
    with engine._conditioned(str(tmp_path / "encoder")) as pipe:
        assert isinstance(pipe.unet, TimestepAwareUNet)
    assert engine.may_take(str(tmp_path / "encoder"))
    assert np.isfinite(engine.read("a red fox", str(tmp_path / "encoder")).cosine(engine.read("a red fox")))
    assert engine._pipeline().unet is unet


def test_of_one_picture_the_row_in_the_language_of_the_best_is_shown():
    index = PromptIndex(tiny.text_encoder())
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    texts = ["red fox", "blue dog", "red fox blue dog", "blue dog here"]
    languages = ["en", "de", "fr", "en"]
    index.add(texts, metadata=[{"language": one} for one in languages], images=[red, blue, blue, blue])
    found = Finder(index).search("red fox", 10)
    assert [(hit.text, hit.metadata["language"]) for hit in found] == [("red fox", "en"), ("blue dog here", "en")]
