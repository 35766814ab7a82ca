import json

import numpy as np
import pytest
import torch

from textcond.pipelines.reference.data import (
    COLOURS,
    HELD_OUT_STYLE,
    STYLES,
    Concept,
    ReferenceData,
    caption,
    composite,
    is_held_out,
    prepare,
    sample_caption,
    slug,
)

FOX = Concept("fox", "🦊", "Animals & Nature", ["animal", "face", "fox"], {"ja": "キツネ"})
CIRCLE = '<circle cx="16" cy="16" r="12" fill="#ff0000"/>'


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """A `node_modules` of the real shape: two animals, a clock, a flag; one icon set with code points."""
    root = tmp_path_factory.mktemp("node_modules")

    def write(path, value):
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value), encoding="utf-8")

    names = {"🦊": "fox", "🐻\u200d❄\ufe0f": "polar bear", "🕐": "one o’clock"}
    for number, icon_set in enumerate([*STYLES.values(), HELD_OUT_STYLE]):
        icons = {"fox": {"body": CIRCLE}, "polar-bear": {"body": CIRCLE, "width": 32, "height": 16}}
        icons["one-oclock"] = {"body": CIRCLE}
        if icon_set == "fxemoji":
            icons = {"fox": {"body": CIRCLE}, "polarbear": {"body": CIRCLE}}
        if icon_set == HELD_OUT_STYLE:
            icons = {"fox": {"body": CIRCLE}}
        data = {"icons": icons, "width": 32, "height": 32}
        write(f"@iconify-json/{icon_set}/icons.json", data)
        if number == 0:
            write(f"@iconify-json/{icon_set}/chars.json", {"1f43b-200d-2744-fe0f": "polar-bear"})
    groups = [
        {
            "name": "Animals & Nature",
            "emojis": [
                {"emoji": emoji, "name": name, "slug": name.replace(" ", "_").replace("’", "")}
                for emoji, name in names.items()
            ],
        },
        {"name": "Flags", "emojis": [{"emoji": "🏁", "name": "chequered flag", "slug": "chequered_flag"}]},
    ]
    write("unicode-emoji-json/data-by-group.json", groups)
    english = {emoji: {"tts": [name], "default": [name, "animal"]} for emoji, name in names.items()}
    write("cldr-annotations-full/annotations/en/annotations.json", {"annotations": {"annotations": english}})
    japanese = {"🦊": {"tts": ["キツネ"], "default": ["きつね"]}}
    write("cldr-annotations-full/annotations/ja/annotations.json", {"annotations": {"annotations": japanese}})
    write("cldr-annotations-derived-full/annotationsDerived/en/annotations.json", {"annotationsDerived": {}})
    return root


def test_prepare_joins_by_code_point_and_by_name_and_leaves_out_clocks_and_flags(modules, tmp_path):
    pytest.importorskip("resvg_py")
    data = ReferenceData.load(prepare(modules, tmp_path / "data"))
    assert [concept.name for concept in data.concepts] == ["fox", "polar bear"]
    assert data.concepts[0].names == {"ja": "キツネ"}
    assert [style for concept, style in data.icons if concept == 1] == list(STYLES)
    assert data.rows(styles=[HELD_OUT_STYLE]) == [len(STYLES)]
    assert data.rows(concepts=1) == list(range(len(STYLES)))
    picture = data.composite([0], ["blue"])[0]
    middle, corner = picture[:, 64, 64], picture[:, 0, 0]
    torch.testing.assert_close(middle, torch.tensor([1.0, -1.0, -1.0]))
    torch.testing.assert_close((corner + 1) * 127.5, torch.tensor(COLOURS["blue"]).float())


def test_a_wide_drawing_is_centred_on_a_square(modules, tmp_path):
    pytest.importorskip("resvg_py")
    data = ReferenceData.load(prepare(modules, tmp_path / "data"))
    bear = next(row for row, icon in enumerate(data.icons) if icon == (1, "noto"))
    assert data.pixels[bear].shape == (128, 128, 4)
    assert data.pixels[bear][0, :, 3].max() == 0


def test_an_interrupted_preparation_leaves_nothing_behind(modules, tmp_path, monkeypatch):
    def broken(svg):
        raise KeyboardInterrupt

    monkeypatch.setattr("textcond.pipelines.reference.data.render", broken)
    with pytest.raises(KeyboardInterrupt):
        prepare(modules, tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_captions_say_what_they_are_asked_to_say():
    assert caption(FOX) == "fox"
    assert caption(FOX, "noto") == "fox, noto style"
    assert caption(FOX, colour="orange") == "fox on an orange background"
    assert caption(FOX, "flat", "red") == "fox, flat style, on a red background"


def test_sampled_captions_always_name_a_colour_that_is_not_the_default():
    rng = np.random.default_rng(0)
    texts = [sample_caption(FOX, "noto", "green", rng) for _ in range(50)]
    assert all("green background" in text for text in texts)
    assert 0 < sum("noto" in text for text in texts) < 50


def test_one_combination_in_five_is_held_out_and_none_on_white():
    held = [is_held_out(f"concept {n}", style, colour) for n in range(50) for style in STYLES for colour in COLOURS]
    share = np.mean(held) * len(COLOURS) / (len(COLOURS) - 1)
    assert share == pytest.approx(0.2, abs=0.03)
    assert not any(is_held_out(f"concept {n}", style, "white") for n in range(50) for style in STYLES)


def test_composite_mixes_by_alpha():
    rgba = torch.tensor([255.0, 0.0, 0.0, 127.5]).view(1, 4, 1, 1)
    mixed = composite(rgba, torch.tensor([0.0, 0.0, 255.0]).view(1, 3, 1, 1))
    torch.testing.assert_close(mixed.flatten(), torch.tensor([0.0, -1.0, 0.0]))


def test_slug_forgets_case_accents_and_hyphens():
    assert slug("Piñata") == slug("pi-nata") == "pinata"
    assert slug("one o’clock") == "oneoclock"
