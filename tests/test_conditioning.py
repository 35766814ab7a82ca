import json

import numpy as np
import pytest
import torch
from tiny import FAMILIES, PROMPTS, conditioning, text_encoder, token_ids
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

from textcond import (
    ConditioningEncoder,
    ConditioningEncoderConfig,
    ConditioningEncoderWithProjection,
    TextEncoder,
)
from textcond.bridges import BRIDGES


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def same(a, b, tolerance=1e-5):
    return torch.allclose(a, b, atol=tolerance, rtol=0)


# What a pipeline calls and reads


@pytest.mark.parametrize("bridge", BRIDGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_backbone_behind_every_bridge_gives_finite_tokens_of_unit_scale(family, bridge):
    encoder = conditioning(family, bridge, width=64)
    output = encoder(token_ids(encoder))
    assert isinstance(output, BaseModelOutputWithPooling)
    assert output[0] is output.last_hidden_state
    assert output[0].shape == (len(PROMPTS), 12, 64)
    assert output[0].isfinite().all()
    assert 0.6 < output[0].std() < 1.5


@pytest.mark.parametrize("family", FAMILIES)
def test_pad_tokens_are_masked_whatever_the_mask_says(family):
    encoder = conditioning(family, "linear", tokens=14)
    ids = token_ids(encoder, ["the dog", "a red fox"])
    real = (ids != encoder.tokenizer.pad_token_id).long()
    assert (real == 0).any()
    tokens = encoder(ids, attention_mask=real)[0]
    assert torch.equal(encoder(ids)[0], tokens)
    assert torch.equal(encoder(ids, attention_mask=torch.ones_like(ids))[0], tokens)
    shorter = encoder(ids[:, :-1])[0]
    kept = real[:, :-1].bool()
    assert same(shorter[kept], tokens[:, :-1][kept])
    hidden = real.clone()
    hidden[:, 1] = 0
    assert not same(encoder(ids, attention_mask=hidden)[0][:, 2], tokens[:, 2])


@pytest.mark.parametrize("family", FAMILIES)
def test_resampler_output_does_not_depend_on_the_amount_of_padding_or_on_the_batch(family):
    encoder = conditioning(family)
    wide = encoder(token_ids(encoder, ["the dog", "a red fox"], 16))[0]
    assert same(encoder(token_ids(encoder, ["the dog", "a red fox"], 14))[0], wide)
    assert same(encoder(token_ids(encoder, ["the dog"], 16))[0], wide[:1])


@pytest.mark.parametrize("bridge", BRIDGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_empty_prompt_gives_finite_states_that_are_the_same_every_time(family, bridge):
    encoder = conditioning(family, bridge, pooled_width=16)
    alone = encoder(token_ids(encoder, [""]))
    assert alone.text_embeds.isfinite().all()
    assert alone.last_hidden_state.isfinite().all()
    assert torch.equal(encoder(token_ids(encoder, [""]))[1], alone[1])
    beside = encoder(token_ids(encoder, ["a red fox", ""]))
    assert same(beside[1][1:], alone[1])
    assert same(beside[0][1:], alone[0])
    assert not same(beside[1][0], beside[1][1], 0.05)


def test_every_hidden_state_is_the_trained_output_and_attentions_are_never_returned():
    encoder = conditioning()
    ids = token_ids(encoder)
    assert encoder(ids).hidden_states is None
    output = encoder(ids, output_hidden_states=True)
    assert output[-1] is output.hidden_states
    for clip_skip in range(33):  # CLIP bigG, the largest in use, has 32 layers
        assert output.hidden_states[-(clip_skip + 2)] is output.last_hidden_state
    assert "attentions" not in output


def test_clip_skip_shim_adds_no_weights():
    encoder = conditioning()
    x = torch.randn(2, 3, 32)
    assert encoder.text_model.final_layer_norm(x) is x
    assert not [name for name in encoder.state_dict() if name.startswith("text_model")]


def test_pooled_vector_comes_first_with_projection_and_second_without():
    with_projection = conditioning(pooled_width=20)
    output = with_projection(token_ids(with_projection))
    assert isinstance(output, CLIPTextModelOutput)
    assert output[0].shape == (len(PROMPTS), 20)
    assert with_projection.config.projection_dim == 20
    plain = ConditioningEncoder.from_text_encoder(text_encoder(), width=32, tokens=12, pooled_width=20)
    output = plain(token_ids(plain))
    assert output[0].shape == (len(PROMPTS), 12, 32)
    assert same(output.pooler_output, with_projection(token_ids(with_projection)).text_embeds)


def test_return_dict_false_gives_a_true_tuple():
    encoder = conditioning(pooled_width=20)
    pooled, tokens = encoder(token_ids(encoder), return_dict=False)
    assert pooled.ndim == 2
    assert tokens.ndim == 3


def test_pooled_vector_follows_the_pooling_of_the_retrieval_face():
    by_mean, by_cls = (
        ConditioningEncoder.from_text_encoder(text_encoder(pooling=pooling), width=32, tokens=12, pooled_width=20)
        for pooling in ("mean", "cls")
    )
    ids = token_ids(by_mean)
    assert same(by_mean(ids)[0], by_cls(ids)[0])
    assert not same(by_mean(ids).pooler_output, by_cls(ids).pooler_output, 0.05)


def test_average_of_layers_is_learned_and_reads_earlier_layers():
    last, average = conditioning(layers="last"), conditioning(layers="average")
    ids = token_ids(average)
    assert not same(last(ids)[0], average(ids)[0], 0.05)
    with torch.enable_grad():
        average(ids)[0].square().sum().backward()
    assert average.layer_average.logits.grad.abs().min() > 0


# One backbone, two faces


def test_both_faces_share_one_backbone_in_memory():
    encoder = text_encoder()
    both = ConditioningEncoder.from_text_encoder(encoder, width=32, tokens=12)
    assert both.backbone is encoder.backbone
    assert both.text_encoder.backbone is encoder.backbone
    ids, before = token_ids(both), both.text_encoder.encode(PROMPTS)
    tokens = both(ids)[0]
    encoder.backbone.get_input_embeddings().weight.mul_(-1)
    assert not same(both(ids)[0], tokens, 0.05)
    assert np.abs(both.text_encoder.encode(PROMPTS) - before).max() > 0.01


def test_a_bridge_leaves_modules_alone_that_transformers_did_not_make():
    encoder = text_encoder()
    trained = nn.Embedding.from_pretrained(torch.randn(encoder.backbone.config.vocab_size, 32))
    encoder.backbone.set_input_embeddings(trained)
    before = trained.weight.clone()
    both = ConditioningEncoder.from_text_encoder(encoder, width=32, tokens=12)
    assert torch.equal(both.get_input_embeddings().weight, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_retrieval_face_is_the_same_before_and_after_saving(family, tmp_path):
    encoder = text_encoder(family, prompts={"query": "query: "})
    encoder = TextEncoder(encoder.backbone, encoder.tokenizer, encoder.config, nn.Linear(32, 24))
    ids = encoder.tokenizer(PROMPTS[0]).input_ids
    vectors = encoder.encode(PROMPTS, kind="query")
    both = ConditioningEncoder.from_text_encoder(encoder, width=32, tokens=12)
    assert np.array_equal(encoder.encode(PROMPTS, kind="query"), vectors)
    both.save_pretrained(tmp_path / "both")
    loaded = ConditioningEncoder.from_pretrained(tmp_path / "both")
    for face in (both.text_encoder, loaded.text_encoder, TextEncoder.from_pretrained(tmp_path / "both")):
        assert np.abs(face.encode(PROMPTS, kind="query") - vectors).max() < 1e-6
        assert face.weights_hash() == encoder.weights_hash()
    assert loaded.tokenizer(PROMPTS[0]).input_ids == ids


@pytest.mark.parametrize("bridge", BRIDGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_saving_and_loading_is_exact(family, bridge, tmp_path):
    encoder = conditioning(family, bridge, pooled_width=16)
    encoder.save_pretrained(tmp_path / "encoder")
    loaded, report = ConditioningEncoderWithProjection.from_pretrained(
        tmp_path / "encoder",
        output_loading_info=True,
        attn_implementation=encoder.config.text_config._attn_implementation,
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = token_ids(encoder)
    assert torch.equal(token_ids(loaded), ids)
    for ours, theirs in zip(encoder(ids).to_tuple(), loaded(ids).to_tuple()):
        assert torch.equal(ours, theirs)
    assert not list((tmp_path / "encoder").glob("*.bin"))


def test_the_heads_of_the_retrieval_face_are_saved_and_loaded(tmp_path):
    encoder = text_encoder()
    encoder.add_heads(sparse=True, tokens=5)
    both = ConditioningEncoder.from_text_encoder(encoder, width=32, tokens=12)
    both.save_pretrained(tmp_path)
    loaded, report = ConditioningEncoder.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert "heads" not in str(conditioning().state_dict().keys())
    for face in (both.text_encoder, loaded.text_encoder, TextEncoder.from_pretrained(tmp_path)):
        assert face.weights_hash() == encoder.weights_hash()
        assert face.encode(PROMPTS[0], output="sparse") == pytest.approx(encoder.encode(PROMPTS[0], output="sparse"))
        assert np.allclose(
            face.encode(PROMPTS[0], output="tokens"), encoder.encode(PROMPTS[0], output="tokens"), atol=1e-6
        )


# Tokenizers


@pytest.mark.parametrize("family", ["mistral", "clip"])
def test_a_tokenizer_without_a_pad_token_of_its_own_gets_one(family):
    encoder = text_encoder(family)
    size, pad = len(encoder.tokenizer), encoder.tokenizer.pad_token_id
    both = ConditioningEncoder.from_text_encoder(encoder, width=32, tokens=12)
    assert (len(encoder.tokenizer), encoder.tokenizer.pad_token_id) == (size, pad)
    tokenizer = both.tokenizer
    assert tokenizer.pad_token_id == size == both.config.pad_token_id
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
    weight = both.get_input_embeddings().weight
    assert len(weight) == size + 1 == both.config.text_config.vocab_size
    assert same(weight[-1], weight[:-1].mean(dim=0))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pipeline_tokenizer_pads_right_to_a_finite_length(family):
    fixed, preserving = conditioning(family, "resampler", tokens=8), conditioning(family, "mlp", tokens=8)
    assert fixed.tokenizer.model_max_length == min(fixed.text_encoder.max_length, 512)
    assert preserving.tokenizer.model_max_length == 8
    assert fixed.tokenizer.padding_side == preserving.tokenizer.padding_side == "right"
    whole = conditioning(family, "mlp", tokens=None)
    assert whole.tokenizer.model_max_length == whole.text_encoder.max_length


# Weights and configuration


def test_dtype_none_means_float32_whatever_the_file_holds(tmp_path):
    encoder = conditioning(pooled_width=16).to(torch.bfloat16)
    assert encoder(token_ids(encoder)).last_hidden_state.dtype == torch.bfloat16
    encoder.save_pretrained(tmp_path)
    load = ConditioningEncoderWithProjection.from_pretrained
    assert load(tmp_path).dtype == torch.float32
    assert load(tmp_path, dtype=None).dtype == torch.float32
    assert load(tmp_path, torch_dtype=None).dtype == torch.float32
    assert load(tmp_path, dtype="auto").dtype == torch.bfloat16
    assert {parameter.dtype for parameter in load(tmp_path, dtype=torch.float16).parameters()} == {torch.float16}


def test_a_bridge_takes_the_dtype_of_its_encoder():
    encoder = text_encoder().to(torch.bfloat16)
    both = ConditioningEncoder.from_text_encoder(encoder, width=32, tokens=12, layers="average", pooled_width=8)
    assert {parameter.dtype for parameter in both.parameters()} == {torch.bfloat16}
    assert both(token_ids(both)).pooler_output.dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_resized_token_embeddings_reload(family, tmp_path):
    encoder = conditioning(family)
    rows = len(encoder.get_input_embeddings().weight)
    encoder.resize_token_embeddings(rows + 3, mean_resizing=False)
    assert encoder.config.text_config.vocab_size == encoder.backbone.config.vocab_size == rows + 3
    encoder.save_pretrained(tmp_path)
    loaded = ConditioningEncoder.from_pretrained(tmp_path)
    assert torch.equal(loaded.get_input_embeddings().weight, encoder.get_input_embeddings().weight)


def test_the_same_seed_gives_the_same_bridge_and_leaves_the_random_state_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    encoder = text_encoder()
    torch.set_rng_state(state)
    one, same_seed, other = (
        ConditioningEncoder.from_text_encoder(encoder, width=32, tokens=12, seed=seed).bridge.state_dict()
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], same_seed[name]) for name in one)
    assert not torch.equal(one["out_proj.weight"], other["out_proj.weight"])


def test_an_unknown_configuration_key_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match="'brige'"):
        ConditioningEncoderConfig(brige="linear")
    with pytest.raises(ValueError, match="poling"):
        ConditioningEncoderConfig(text_encoder={"poling": "mean"})
    conditioning().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"colour": "red"}))
    with pytest.raises(ValueError, match="'colour'"):
        ConditioningEncoder.from_pretrained(tmp_path)


def test_the_configuration_survives_json(tmp_path):
    encoder = conditioning("xlm-roberta", "mlp", layers="average", pooled_width=16)
    encoder.config.text_config.name_or_path = "somebody/backbone"
    encoder.config.save_pretrained(tmp_path)
    assert "somebody" not in (tmp_path / "config.json").read_text()
    loaded = ConditioningEncoderConfig.from_pretrained(tmp_path)
    for name in ("bridge", "hidden_size", "tokens", "projection_dim", "layers", "pad_token_id", "text_encoder"):
        assert getattr(loaded, name) == getattr(encoder.config, name)
    assert loaded.use_attention_mask is True
    assert type(loaded.text_config) is type(encoder.config.text_config)
    assert loaded.text_config.vocab_size == encoder.config.text_config.vocab_size


def test_the_attention_implementation_reaches_the_backbone(tmp_path):
    conditioning().save_pretrained(tmp_path)
    loaded = ConditioningEncoder.from_pretrained(tmp_path, attn_implementation="eager")
    assert loaded.backbone.config._attn_implementation == "eager"


def test_a_second_variant_leaves_the_first_in_place(tmp_path):
    encoder = conditioning()
    encoder.save_pretrained(tmp_path)
    encoder.save_pretrained(tmp_path, variant="fp16")
    encoder.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.glob("*.safetensors")} == {"model.safetensors", "model.fp16.safetensors"}
    loaded = ConditioningEncoder.from_pretrained(tmp_path, variant="fp16")
    assert same(loaded(token_ids(encoder))[0], encoder(token_ids(encoder))[0])


def test_saving_over_another_model_leaves_none_of_its_files(tmp_path):
    text_encoder("xlm-roberta").save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("card")
    encoder = conditioning()
    encoder.save_pretrained(tmp_path)
    assert TextEncoder.from_pretrained(tmp_path).weights_hash() == encoder.text_encoder.weights_hash()
    assert (tmp_path / "README.md").read_text() == "card"


def test_pickled_weights_are_never_read(tmp_path):
    encoder = conditioning()
    encoder.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(encoder.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        ConditioningEncoder.from_pretrained(tmp_path)


def test_a_save_that_fails_leaves_nothing_behind(tmp_path):
    encoder = conditioning()

    class Broken:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    encoder.tokenizer = Broken()
    with pytest.raises(OSError, match="disk full"):
        encoder.save_pretrained(tmp_path / "encoder")
    assert not list(tmp_path.iterdir())


def test_a_folder_without_tokenizer_says_where_to_get_the_retrieval_face(tmp_path):
    encoder = conditioning()
    encoder.tokenizer = None
    encoder.save_pretrained(tmp_path)
    loaded = ConditioningEncoder.from_pretrained(tmp_path)
    assert loaded.tokenizer is None
    with pytest.raises(ValueError, match="retrieval_encoder"):
        loaded.text_encoder  # noqa: B018


def test_training_reaches_bridge_and_backbone_with_gradient_checkpointing():
    encoder = conditioning().train()
    encoder.gradient_checkpointing_enable()
    with torch.enable_grad():
        encoder(token_ids(encoder))[0].square().sum().backward()
    assert encoder.bridge.queries.grad.abs().sum() > 0
    assert encoder.get_input_embeddings().weight.grad.abs().sum() > 0


def test_errors_name_the_value_and_the_mend():
    with pytest.raises(ValueError, match="pass pooled_width=1280"):
        ConditioningEncoderWithProjection.from_text_encoder(text_encoder(), width=32)
    with pytest.raises(ValueError, match="'add_model_info_to_auto_map' is no model"):
        ConditioningEncoder(ConditioningEncoderConfig(backbone_class="add_model_info_to_auto_map"))
    with pytest.raises(ValueError, match=r"'middle'.*last, average"):
        conditioning(layers="middle")

    class Own(type(text_encoder().backbone)):
        pass

    encoder = text_encoder()
    encoder.backbone.__class__ = Own
    with pytest.raises(ValueError, match="Own is not a class of transformers"):
        ConditioningEncoder.from_text_encoder(encoder)


def test_classes_are_named_by_the_package_that_model_index_json_names():
    import textcond

    for cls in (ConditioningEncoder, ConditioningEncoderWithProjection, ConditioningEncoderConfig):
        assert cls.__module__ == "textcond"
        assert getattr(textcond, cls.__name__) is cls
    assert issubclass(ConditioningEncoder, textcond.PreTrainedModel)
