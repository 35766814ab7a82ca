import json
import re

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from textcond import TextEncoder, TextEncoderConfig
from textcond.open_clip_import import convert_text_tower, load_open_clip_text, open_clip_tokenizer

TEXTS = ["a photo of a cat", "", "Two dogs!! it's 1,234 o'clock", "Crème brûlée — 赤いりんご 🦊", "word " * 100]
VISION = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32}


def model_config(**text):
    text_cfg = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2, **text}
    return {"embed_dim": 24, "vision_cfg": dict(VISION), "text_cfg": text_cfg}


def build(config, custom=False):
    """Return a random open_clip model whose biases and norms are not at their neutral initial values."""
    torch.manual_seed(0)
    model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """Register the tiny architecture under a name, as users do with add_model_config."""
    folder = tmp_path_factory.mktemp("open_clip")
    (folder / "tiny-clip.json").write_text(json.dumps(model_config()))
    open_clip.add_model_config(folder / "tiny-clip.json")
    model = build(model_config())
    save_file(model.state_dict(), folder / "tiny.safetensors")
    return model, folder / "tiny.safetensors"


def encode_with_open_clip(model, texts, context_length=24):
    ids = open_clip.SimpleTokenizer(context_length=context_length)(texts)
    with torch.inference_mode():
        return model.encode_text(ids, normalize=True).numpy()


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("custom", [False, True])
def test_vectors_are_those_of_open_clip(tmp_path, quick_gelu, custom):
    config = model_config(norm_kwargs={"eps": 1e-4}) | {"quick_gelu": quick_gelu}
    model = build(config, custom)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")

    encoder = TextEncoder.from_pretrained(f"open_clip:local-dir:{tmp_path}")
    assert (encoder.dim, encoder.max_length, encoder.config.pooling) == (24, 24, "eos")
    assert encoder.backbone.config.hidden_act == ("quick_gelu" if quick_gelu else "gelu")
    assert abs(encoder.encode(TEXTS) - encode_with_open_clip(model, TEXTS)).max() < 1e-6


def test_a_model_name_and_a_checkpoint_file_name_an_encoder(registered):
    model, file = registered
    encoder = TextEncoder.from_pretrained(f"open_clip:tiny-clip/{file}", dtype=torch.float32)
    assert abs(encoder.encode(TEXTS) - encode_with_open_clip(model, TEXTS)).max() < 1e-6


def test_the_stock_class_with_the_converted_weights_gives_the_same_projected_vector(registered):
    model, file = registered
    backbone, projection, tokenizer = load_open_clip_text(f"tiny-clip/{file}")
    stock = CLIPTextModelWithProjection(backbone.config).eval()
    stock.text_model.load_state_dict(backbone.state_dict())
    stock.text_projection.load_state_dict(projection.state_dict())
    ids = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.inference_mode():
        vectors = torch.nn.functional.normalize(stock(ids).text_embeds, dim=-1).numpy()
    assert abs(vectors - encode_with_open_clip(model, TEXTS)).max() < 1e-6


def test_a_saved_import_reads_back_exactly(registered, tmp_path):
    encoder = TextEncoder.from_pretrained(f"open_clip:tiny-clip/{registered[1]}")
    encoder.save_pretrained(tmp_path / "saved")
    again = TextEncoder.from_pretrained(tmp_path / "saved")
    assert (again.encode(TEXTS) == encoder.encode(TEXTS)).all()
    assert again.weights_hash() == encoder.weights_hash()
    assert isinstance(again.tokenizer, CLIPTokenizer)


@pytest.mark.parametrize("option", [{"proj_bias": True}, {"proj_type": "none"}])
def test_projection_with_a_bias_or_without_a_projection(option):
    config = model_config(**option)
    model = build(config, custom=True)
    tensors = {name.removeprefix("text."): tensor for name, tensor in model.state_dict().items()}
    backbone, projection = convert_text_tower(tensors, config)
    encoder = TextEncoder(backbone, open_clip_tokenizer(24), TextEncoderConfig(pooling="eos"), projection)
    assert abs(encoder.encode(TEXTS) - encode_with_open_clip(model, TEXTS)).max() < 1e-6


def test_tokenizer_gives_the_ids_of_open_clip():
    texts = [
        *TEXTS,
        "I'm you're we've they'll he'd CAN'T",
        "x=1; y=2.5%  (a_b) [c] {d} #tag @me http://x.y/z?q=1",
        "tabs\tand\nnewlines   and  spaces ",
        "Ελληνικά кириллица עברית العربية हिन्दी ไทย 한국어 漢字かな",
        "🧑🏽‍🚀👩‍👩‍👧 ❤️ ✈ 1️⃣",
        "É (composed) É (decomposed) ñ ß ø",
        "''s '''d ...'s don''t",
    ]
    ours, theirs = open_clip_tokenizer(), open_clip.SimpleTokenizer()
    ids = ours(texts, padding="max_length", truncation=True)
    for row, mask, expected in zip(ids["input_ids"], ids["attention_mask"], theirs(texts).tolist()):
        length = expected.index(49407) + 1
        assert row[:length] == expected[:length]
        assert sum(mask) == length


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ({"no_causal_mask": True}, "no_causal_mask=True"),
        ({"embed_cls": True}, "embed_cls=True"),
        ({"hf_model_name": "roberta-base"}, "hf_model_name='roberta-base'"),
        ({"hf_tokenizer_name": "x"}, "hf_tokenizer_name='x'"),
        ({"pool_type": "last"}, "pool_type='last'"),
        ({"qk_norm": True}, "qk_norm=True"),
    ],
)
def test_architectures_that_clip_does_not_express_are_refused_by_name(text, option):
    with pytest.raises(ValueError, match=re.escape(option)):
        convert_text_tower({}, model_config(**text))


def test_bad_sources_are_named(registered, tmp_path):
    _, file = registered
    load = load_open_clip_text
    with pytest.raises(ValueError, match="no model 'ViT-Z'"):
        load("ViT-Z/openai")
    with pytest.raises(ValueError, match=r"tags are .*laion2b_s34b_b79k"):
        load("ViT-B-32")
    with pytest.raises(FileNotFoundError, match="neither a file nor a tag of tiny-clip"):
        load("tiny-clip/missing.safetensors")
    pickled = tmp_path / "tiny.pt"
    pickled.write_bytes(b"x")
    with pytest.raises(ValueError, match="pickled weights are refused"):
        load(f"tiny-clip/{pickled}")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"cut\.safetensors is damaged or cut short"):
        load(f"tiny-clip/{cut}")
    with pytest.raises(FileNotFoundError, match="open_clip_config"):
        load(f"local-dir:{tmp_path}")


def test_a_checkpoint_of_another_model_is_refused(registered, tmp_path):
    tensors = registered[0].state_dict()
    del tensors["transformer.resblocks.1.ln_1.weight"]
    with pytest.raises(ValueError, match=r"lacks 'transformer\.resblocks\.1\.ln_1\.weight'"):
        convert_text_tower(tensors, model_config())
    with pytest.raises(ValueError, match="does not fit its model config"):
        convert_text_tower(registered[0].state_dict(), model_config(context_length=10))


def test_a_tag_brings_its_own_activation(monkeypatch, registered):
    from textcond import open_clip_import

    monkeypatch.setattr(open_clip_import, "_download", lambda repo, file: (repo, file))
    config, _, weights = open_clip_import.find_open_clip("ViT-B-32/openai")
    assert config["quick_gelu"] is True
    assert weights == ("timm/vit_base_patch32_clip_224.openai", "open_clip_model.safetensors")
    config, _, _ = open_clip_import.find_open_clip("ViT-B-32/laion2b_s34b_b79k")
    assert config["quick_gelu"] is False
