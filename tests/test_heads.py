import json

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from textcond import TextEncoder

TEXTS = ["the dog the dog", "", "a red fox in winter", "cat!"]


@pytest.fixture
def bert():
    encoder = tiny.text_encoder("bert")
    torch.manual_seed(0)
    encoder.add_heads(tokens=16)
    with torch.no_grad():
        encoder.heads["sparse"].linear.bias.fill_(0.1)
    return encoder


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "mpnet", "t5", "qwen2"])
def test_features_are_what_the_formulas_say_text_by_text(family):
    encoder = tiny.text_encoder(family)
    encoder.add_heads(tokens=16)
    features = encoder.features(TEXTS)
    for row, text in enumerate(TEXTS):
        ids = encoder.tokenize([text])["input_ids"]
        states = encoder.backbone(input_ids=ids).last_hidden_state[0].double()
        special = torch.tensor([token in encoder.tokenizer.all_special_ids for token in ids[0].tolist()])
        linear = encoder.heads["sparse"].linear.double()
        weights = torch.where(special, 0, torch.relu(states @ linear.weight[0] + linear.bias))
        linear = encoder.heads["tokens"].linear.double()
        vectors = states @ linear.weight.T + linear.bias
        vectors = vectors / vectors.norm(dim=-1, keepdim=True)
        counts = torch.ones(len(states), dtype=torch.bool)
        counts[0] = not special[0]
        encoder.heads.float()
        length = len(states)
        assert torch.equal(features.token_ids[row, :length], ids[0])
        assert torch.equal(features.token_mask[row, :length], counts)
        assert not features.token_mask[row, length:].any()
        assert torch.allclose(features.sparse[row, :length].double(), weights, atol=1e-5)
        assert torch.allclose(features.tokens[row, :length][counts].double(), vectors[counts], atol=1e-5)
        assert features.sparse[row, length:].abs().sum() == 0
        assert features.tokens[row][~features.token_mask[row]].abs().sum() == 0


def test_heads_are_trained_and_pass_gradients_to_the_backbone(bert):
    features = bert.features(TEXTS)
    (features.sparse.sum() + features.tokens[..., 0].sum()).backward()
    for head in bert.heads.values():
        assert head.linear.weight.grad.abs().sum() > 0
    assert bert.backbone.embeddings.word_embeddings.weight.grad.abs().sum() > 0


def test_encode_gives_the_largest_weight_of_each_token_and_a_vector_a_token(bert):
    features = bert.features(TEXTS)
    sparse = bert.encode(TEXTS, output="sparse")
    vectors = bert.encode(TEXTS, output="tokens")
    assert sparse[1] == {}
    for row in range(len(TEXTS)):
        weights = {}
        for token, weight in zip(features.token_ids[row].tolist(), features.sparse[row].tolist()):
            if weight:
                weights[token] = max(weights.get(token, 0), weight)
        assert sparse[row] == pytest.approx(weights, abs=1e-6)
        assert vectors[row].shape == (int(features.token_mask[row].sum()), 16)
        assert np.allclose(np.linalg.norm(vectors[row], axis=1), 1, atol=1e-6)
    assert max(map(len, sparse)) > 1
    assert bert.encode(TEXTS[2], output="sparse") == pytest.approx(sparse[2], abs=1e-6)
    assert torch.is_tensor(bert.encode(TEXTS[2], output="tokens", convert_to_tensor=True))
    assert bert.encode([], output="tokens") == []


def test_an_output_without_a_head_is_named(bert):
    with pytest.raises(ValueError, match="no head for output='colbert': use one of dense, sparse, tokens"):
        bert.encode(TEXTS, output="colbert")
    bert.add_heads(sparse=False, tokens=True)
    assert bert.features(TEXTS).sparse is None
    assert bert.features(TEXTS).tokens.shape[-1] == 32
    with pytest.raises(ValueError, match="no head for output='sparse'"):
        bert.encode(TEXTS, output="sparse")
    with pytest.raises(ValueError, match="tokens=-1: give the width"):
        bert.add_heads(tokens=-1)


def test_heads_are_saved_hashed_and_no_matter_to_sentence_transformers(bert, tmp_path):
    plain = tiny.text_encoder("bert")
    assert bert.weights_hash() != plain.weights_hash()
    bert.save_pretrained(tmp_path / "model")
    again = TextEncoder.from_pretrained(tmp_path / "model")
    assert again.weights_hash() == bert.weights_hash()
    assert again.encode(TEXTS, output="sparse") == bert.encode(TEXTS, output="sparse")
    theirs = SentenceTransformer(str(tmp_path / "model"), device="cpu").encode(TEXTS)
    assert np.abs(theirs - bert.encode(TEXTS)).max() < 1e-6
    assert np.array_equal(bert.encode(TEXTS), plain.encode(TEXTS))
    plain.save_pretrained(tmp_path / "model")
    assert not TextEncoder.from_pretrained(tmp_path / "model").heads


def test_heads_that_do_not_fit_are_named(bert, tmp_path):
    bert.save_pretrained(tmp_path)
    file = tmp_path / "heads.safetensors"
    tensors = load_file(file)
    (tmp_path / "heads.json").write_text(json.dumps({"sparse": 1, "tokens": 8}))
    with pytest.raises(ValueError, match=r"heads\.safetensors does not fit heads\.json and a backbone 32 wide"):
        TextEncoder.from_pretrained(tmp_path)
    save_file(tensors, file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"heads\.safetensors is damaged"):
        TextEncoder.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"heads\.json but no heads\.safetensors"):
        TextEncoder.from_pretrained(tmp_path)
