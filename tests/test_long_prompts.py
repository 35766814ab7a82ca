"""Prompts of 20 to 400 words: every word is read, and padding, batch and negative change nothing."""

import logging

import pytest
import tiny_families
import torch
import transformers
from tiny import generate, stable_diffusion, stable_diffusion_xl, tokenizer

from textcond import ConditioningEncoder, ConditioningEncoderWithProjection, TextEncoder, TextEncoderConfig
from textcond.pipelines import swap_text_encoder

WORDS = (20, 75, 100, 200, 400)
CHUNK = {"fixed": None, "growing": 100}


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def prompt(words, change=None):
    """A prompt of one-letter words, each one token; `change` is the place of a word that is another one."""
    letters = [chr(ord("a") + (7 * i + i // 26) % 26) for i in range(words)]
    if change is not None:
        letters[change] = "?"
    return " ".join(letters)


def text_encoder(positions=512):
    """A tiny BERT with as many positions as a real one."""
    tok = tokenizer("bert", positions)
    config = transformers.BertConfig(
        vocab_size=len(tok), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=positions, pad_token_id=tok.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(4)
    return TextEncoder(model, tok, TextEncoderConfig(pooling="mean"))


def encoder(kind="fixed", xl=False, tokens=16, **options):
    options = {"width": 32, "tokens": tokens, "chunk": CHUNK[kind], **options}
    if xl:
        return ConditioningEncoderWithProjection.from_text_encoder(
            text_encoder(), **options | {"width": 64, "pooled_width": 32}
        )
    return ConditioningEncoder.from_text_encoder(text_encoder(), **options)


def pipeline(kind, xl=False):
    pipe = stable_diffusion_xl() if xl else stable_diffusion()
    swap_text_encoder(pipe, encoder(kind, xl))
    return pipe


def embeds(pipe, prompt, negative=None):
    return pipe.encode_prompt(
        prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt=negative
    )


@pytest.mark.parametrize("xl", [False, True])
@pytest.mark.parametrize("kind", CHUNK)
def test_every_word_counts_without_a_warning(kind, xl, caplog):
    pipe = pipeline(kind, xl)
    limit = (pipe.tokenizer_2 if xl else pipe.tokenizer).model_max_length
    assert limit == (512 if kind == "fixed" else 511)
    logging.getLogger("diffusers").addHandler(caplog.handler)
    try:
        for words in WORDS:
            whole = embeds(pipe, prompt(words))[0]
            for place in (0, words // 2, words - 1):
                other = embeds(pipe, prompt(words, place))[0]
                assert other.shape == whole.shape
                assert (other - whole).abs().max() > 1e-3
        assert not caplog.records
        embeds(pipe, prompt(600))
        assert "truncated" in caplog.text
    finally:
        logging.getLogger("diffusers").removeHandler(caplog.handler)


@pytest.mark.parametrize("kind", CHUNK)
def test_the_number_of_tokens_is_fixed_or_doubles_with_the_length(kind):
    pipe = pipeline(kind)
    # [CLS] and [SEP] count: 100 words are 102 states, more than one chunk.
    expected = [16] * 5 if kind == "fixed" else [16, 16, 32, 64, 128]
    assert [embeds(pipe, prompt(words))[0].shape[1] for words in WORDS] == expected


@pytest.mark.parametrize("xl", [False, True])
@pytest.mark.parametrize("kind", CHUNK)
def test_a_negative_prompt_gets_as_many_tokens_as_the_prompt(kind, xl):
    pipe = pipeline(kind, xl)
    for words in WORDS:
        for negative in (None, "", "an ugly cat"):
            tokens, null, *_ = embeds(pipe, prompt(words), negative)
            assert null.shape == tokens.shape
        picture = generate(pipe, prompt(words), negative_prompt="an ugly cat")
        assert not torch.equal(generate(pipe, prompt(words), negative_prompt="a dog"), picture)


def test_a_long_negative_prompt_is_cut_to_the_output_unless_encoded_as_a_prompt():
    pipe = pipeline("fixed")
    cut = [embeds(pipe, "a fox", prompt(100, change))[1] for change in (None, 99)]
    assert torch.equal(*cut)
    whole = [embeds(pipe, prompt(100, change))[0] for change in (None, 99)]
    assert not torch.allclose(*whole, atol=1e-3)
    pictures = [generate(pipe, "a fox", negative_prompt_embeds=one) for one in whole]
    assert not torch.equal(*pictures)


@pytest.mark.parametrize("xl", [False, True])
@pytest.mark.parametrize("kind", CHUNK)
def test_a_batch_of_mixed_lengths_gives_the_pictures_of_single_prompts(kind, xl):
    pipe, prompts = pipeline(kind, xl), [prompt(words) for words in WORDS]
    seeds = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    together = generate(pipe, prompts, negative_prompt=["an ugly cat"] * len(prompts), generator=seeds)
    for i, text in enumerate(prompts):
        alone = generate(pipe, text, negative_prompt="an ugly cat", generator=torch.Generator().manual_seed(i))
        assert torch.allclose(together[i : i + 1], alone, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_growing_costs_short_prompts_nothing_and_keeps_the_weights_of_the_fixed_bridge():
    fixed, growing = encoder("fixed"), encoder("growing")
    growing.load_state_dict(fixed.state_dict())
    ids = growing.tokenizer([prompt(20), ""], padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(growing(ids)[0], fixed(ids)[0])


def test_a_saved_growing_encoder_grows_as_before(tmp_path):
    saved = encoder("growing")
    saved.save_pretrained(tmp_path)
    loaded = ConditioningEncoder.from_pretrained(tmp_path)
    ids = loaded.tokenizer([prompt(400)], padding="max_length", return_tensors="pt").input_ids
    assert loaded(ids)[0].shape[1] == 128
    assert torch.equal(loaded(ids)[0], saved(ids)[0])


def test_a_prompt_length_beyond_that_of_retrieval_is_read_to_its_end():
    short = text_encoder()
    short.config.max_length = 128
    assert ConditioningEncoder.from_text_encoder(short, width=32, tokens=16).tokenizer.model_max_length == 128
    new = ConditioningEncoder.from_text_encoder(short, width=32, tokens=16, prompt_length=512)
    assert new.tokenizer.model_max_length == 512
    assert new.text_encoder.max_length == 128
    pipe = stable_diffusion()
    swap_text_encoder(pipe, new)
    assert not torch.allclose(embeds(pipe, prompt(400))[0], embeds(pipe, prompt(400, 399))[0], atol=1e-3)


def test_a_prompt_is_never_as_long_as_an_output():
    # 512 would ask for 32 blocks of 16.
    new = encoder("growing", chunk=200, tokens=64)
    assert new.tokenizer.model_max_length == 511


def test_errors_name_the_value_and_the_mend():
    with pytest.raises(ValueError, match=r"prompt_length=600.*positions for 512"):
        encoder(prompt_length=600)
    with pytest.raises(ValueError, match=r"chunk=20 makes 1024 tokens .* positions for 512"):
        encoder(chunk=20, tokens=32)
    with pytest.raises(ValueError, match="chunk=0"):
        encoder(chunk=0)
    with pytest.raises(ValueError, match="chunk=8 for a linear bridge"):
        encoder(chunk=8, bridge="linear")
    with pytest.raises(ValueError, match="prompt_length=80 for a linear bridge: pass it as tokens"):
        encoder(bridge="linear", prompt_length=80)
    with pytest.raises(ValueError, match=r"a text of 513 tokens, and BertModel has positions for 512"):
        encoder()(torch.full((1, 513), 7))
    pipe = stable_diffusion_xl()
    with pytest.raises(ValueError, match="grow with the prompt, and are joined"):
        swap_text_encoder(pipe, encoder(tokens=77, chunk=256), "text_encoder")
    new = encoder("growing")
    new.tokenizer.model_max_length = 512
    with pytest.raises(ValueError, match=r"set tokenizer\.model_max_length = 511"):
        swap_text_encoder(stable_diffusion(), new)
    pipe = tiny_families.stable_diffusion_3()
    with pytest.raises(ValueError, match="does not ask as many of its negative prompt"):
        swap_text_encoder(pipe, encoder("growing", xl=True))
