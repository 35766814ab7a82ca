import io
import json
import struct
import zlib

import numpy as np
import open_clip
import pytest
import tiny
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

from textcond import PromptIndex, TextEncoder
from textcond.index.image_text import ImageTextEncoder, load_encoder
from textcond.index.pictures import MAX_PIXELS, read_picture

TEXTS = ["a red fox", "", "two green birds on a fence"]
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8}


def pictures():
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 255, (24 + 3 * n, 32, 3), np.uint8)) for n in range(5)]


def disturb(model):
    """Norms and biases of a new model are neutral: they would hide mistakes."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def processor(kind):
    size = {"shortest_edge": 16} if kind == "CLIP" else {"height": 16, "width": 16}
    return getattr(transformers, f"{kind}ImageProcessor")(size=size, crop_size={"height": 16, "width": 16})


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny CLIP folder and the stock model in it."""
    folder, tokenizer = tmp_path_factory.mktemp("clip"), tiny.tokenizer("clip", 77)
    text = tiny.clip_text_model(tokenizer, projection=24).config.to_dict()
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24))
    disturb(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor("CLIP").save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("siglip"), tiny.tokenizer("t5", 20)
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 20, "projection_size": 16}
    text |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=VISION))
    disturb(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor("Siglip").save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open_clip")
    config = {
        "embed_dim": 24,
        "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
        "quick_gelu": True,
    }
    model = disturb(open_clip.CLIP(**config))
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder, model


def unit(tensor):
    return torch.nn.functional.normalize(tensor, dim=-1).detach().numpy()


def features(output):
    return unit(getattr(output, "pooler_output", output))


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_text_and_picture_vectors_are_those_of_transformers(name, request):
    folder, model = request.getfixturevalue(name)
    encoder = load_encoder(folder)
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)(images=pictures(), return_tensors="pt")
    expected = features(model.get_image_features(**pixels))
    found = encoder.encode_image(pictures(), batch_size=2)
    assert found.dtype == np.float32
    assert abs(found - expected).max() < 1e-5

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    length = {"padding": "max_length", "max_length": 20} if name == "siglip" else {"padding": True}
    ids = tokenizer(TEXTS, return_tensors="pt", truncation=True, **length)
    given = {"input_ids": ids.input_ids} | ({} if name == "siglip" else {"attention_mask": ids.attention_mask})
    texts = encoder.encode(TEXTS)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    assert abs(texts - features(model.get_text_features(**given))).max() < 1e-5


def test_picture_vectors_are_those_of_open_clip(open_clip_folder):
    folder, model = open_clip_folder
    encoder = load_encoder(f"open_clip:local-dir:{folder}")
    stock, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    pixels = torch.stack([preprocess(picture) for picture in pictures()])
    expected = model.encode_image(pixels, normalize=True).detach().numpy()
    assert abs(encoder.encode_image(pictures()) - expected).max() < 1e-5
    assert torch.equal(stock.visual.conv1.weight, encoder.image_tower.visual.conv1.weight)


@pytest.mark.parametrize("name", ["clip", "open_clip"])
def test_both_towers_are_saved_and_loaded(name, clip, open_clip_folder, tmp_path):
    encoder = load_encoder(clip[0] if name == "clip" else f"open_clip:local-dir:{open_clip_folder[0]}")
    encoder.save_pretrained(tmp_path / "saved")
    again = load_encoder(tmp_path / "saved")
    assert isinstance(again, ImageTextEncoder)
    assert np.array_equal(again.encode_image(pictures()), encoder.encode_image(pictures()))
    assert np.array_equal(again.encode(TEXTS), encoder.encode(TEXTS))
    # an index built with the text side alone opens with both
    assert again.weights_hash() == TextEncoder.from_pretrained(tmp_path / "saved").weights_hash()


def test_an_encoder_without_image_tower_stays_a_text_encoder(tmp_path):
    tiny.text_encoder().save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    assert type(encoder) is TextEncoder
    assert not hasattr(encoder, "encode_image")
    with pytest.raises(ValueError, match="has no image tower: give a CLIP or SigLIP"):
        ImageTextEncoder.from_pretrained(tmp_path)


def test_a_siglip_folder_cannot_be_saved_in_a_layout_that_loses_its_padding(siglip, tmp_path):
    with pytest.raises(ValueError, match="copy"):
        load_encoder(siglip[0]).save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="takes no max_length"):
        load_encoder(siglip[0], max_length=5)


def test_towers_of_different_models_are_refused(clip):
    text = tiny.text_encoder("clip")
    with pytest.raises(ValueError, match="24-wide vectors, the text encoder 32"):
        ImageTextEncoder(text.backbone, text.tokenizer, text.config, image_tower=load_encoder(clip[0]).image_tower)


def test_no_pictures_give_no_vectors(clip):
    assert load_encoder(clip[0]).encode_image([]).shape == (0, 24)


def png(picture, **options):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", **options)
    return buffer.getvalue()


def test_files_bytes_and_pictures_in_memory_give_the_same_vector(clip, tmp_path):
    picture = pictures()[0]
    picture.save(tmp_path / "a.png")
    found = load_encoder(clip[0]).encode_image([picture, tmp_path / "a.png", png(picture), str(tmp_path / "a.png")])
    assert (found == found[0]).all()


def test_transparency_is_laid_on_white_and_cameras_are_turned_upright(tmp_path):
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert read_picture(clear).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4))
    assert read_picture(png(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg").size == (4, 8)


def bomb(width, height):
    """A PNG of a few bytes that says it has width x height pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no picture", "not a readable PNG"),
        (b"", "not a readable PNG"),
        (png(pictures()[0])[:300], "damaged or cut short"),
        (bomb(60_000, 60_000), f"too many pixels: up to {MAX_PIXELS:,}"),
        (bomb(10_000, 10_000), "10,000 x 10,000 pixels"),
        (bomb(8, 8), "damaged or cut short"),
    ],
)
def test_bad_pictures_are_one_clear_error(content, message, tmp_path):
    (tmp_path / "bad.png").write_bytes(content)
    for source in (content, tmp_path / "bad.png"):
        with pytest.raises(ValueError, match=message) as error:
            read_picture(source)
        assert "\n" not in str(error.value)
    assert "bad.png" in str(error.value)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_format_is_read_and_others_are_not(form, tmp_path):
    Image.new("RGB", (5, 4), "red").save(tmp_path / "picture", form)
    assert read_picture(tmp_path / "picture").size == (5, 4)
    Image.new("RGB", (5, 4)).save(tmp_path / "picture.ppm", "PPM")
    with pytest.raises(ValueError, match="not a readable"):
        read_picture(tmp_path / "picture.ppm")


def test_what_is_no_picture_at_all_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no image file"):
        read_picture(tmp_path / "none.png")
    with pytest.raises(TypeError, match="got int"):
        read_picture(5)


def test_pictures_find_prompts_and_prompts_find_pictures(clip, tmp_path):
    encoder = load_encoder(clip[0])
    index = PromptIndex.create(tmp_path / "index", encoder)
    index.add(["", *TEXTS[::2]], images=[pictures()[0], None, None])
    (vector,) = encoder.encode_image(pictures()[:1])
    texts = encoder.encode(TEXTS[::2])
    cosines = texts @ vector / np.linalg.norm(texts, axis=1)
    found = index.search(pictures()[0], k=3, collapse=False)
    assert [hit.text for hit in found] == ["", *(TEXTS[::2][place] for place in np.argsort(-cosines))]
    assert found[0].score == pytest.approx(1, abs=1e-3)
    assert found[0].image.size == pictures()[0].size
    assert any(hit.image is not None for hit in index.search("a red fox", k=3, mode="dense"))
    # the index loads both towers by the encoder's name
    again = PromptIndex.open(tmp_path / "index")
    assert [hit.id for hit in again.search(pictures()[0], k=3, collapse=False)] == [hit.id for hit in found]


def test_a_picture_is_refused_where_the_encoder_reads_none():
    index = PromptIndex(tiny.text_encoder())
    index.add(["a red fox"], images=[pictures()[0]])
    with pytest.raises(ValueError, match="reads no pictures: use a text, or index with a CLIP model"):
        index.search(pictures()[0])
    assert index.search("a fox")[0].image is not None


def test_pictures_of_many_hits_are_read_in_any_order_and_in_few_reads(monkeypatch):
    index = PromptIndex(tiny.text_encoder())
    names = [f"{colour} {number}" for number in range(25) for colour in ("red", "blue")]
    index.add(
        names, images=[Image.new("RGB", (2, 2), (number, 0, 0)) if number % 5 else None for number in range(len(names))]
    )
    reads, get = [], index.store.get
    monkeypatch.setattr(index.store, "get", lambda ids, **options: reads.append(list(ids)) or get(ids, **options))
    hits = index.search("red 3", k=len(names), collapse=False)
    for hit in [*hits[::3], *hits[::-1]]:
        number = names.index(hit.text)
        assert (hit.image and hit.image.getpixel((0, 0))[0]) == (number if number % 5 else None)
    assert len(hits) == len(names)
    assert len(reads) < len(hits) / 2
    gone = index.search("red 3", k=2)
    index.delete([hit.id for hit in gone])
    assert [hit.image for hit in gone] == [None, None]


def test_an_index_of_the_text_side_takes_pictures_with_both_towers(clip, tmp_path):
    index = PromptIndex.create(tmp_path / "index", TextEncoder.from_pretrained(clip[0]))
    index.add(TEXTS[::2])
    found = PromptIndex.open(tmp_path / "index", load_encoder(clip[0])).search(pictures()[1], k=2)
    assert {hit.text for hit in found} == set(TEXTS[::2])
