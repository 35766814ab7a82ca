"""Tiny random-weight text-to-audio pipelines of diffusers in their stock classes, built in memory for tests."""

import diffusers
import torch
import transformers
from diffusers.pipelines.audioldm2 import AudioLDM2ProjectionModel, AudioLDM2UNet2DConditionModel
from diffusers.pipelines.stable_audio import StableAudioProjectionModel
from tiny import LETTERS

# MusicLDM pads negative prompts to the width of its pooled vector, so this is a length too.
POOLED = 32


def roberta_tokenizer(length: int) -> transformers.RobertaTokenizer:
    """CLAP's kind of tokenizer, byte by byte."""
    vocab = {piece: i for i, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *LETTERS, "Ġ"])}
    return transformers.RobertaTokenizer(vocab=vocab, merges=[], model_max_length=length)


def t5_tokenizer(length: int) -> transformers.T5Tokenizer:
    """T5's kind of tokenizer, letter by letter."""
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -2.0) for letter in LETTERS)]
    return transformers.T5Tokenizer(vocab=scores, extra_ids=0, model_max_length=length)


def clap(rows: int) -> transformers.ClapModel:
    """A CLAP of two text layers; the audio tower is only ever asked to score waveforms."""
    text = {
        "vocab_size": rows, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 80, "projection_dim": POOLED, "pad_token_id": 1,
    }  # fmt: skip
    audio = {
        "spec_size": 64, "num_mel_bins": 16, "patch_size": 4, "patch_stride": [4, 4], "window_size": 2,
        "patch_embeds_hidden_size": 8, "depths": [1, 1], "num_attention_heads": [1, 1], "num_hidden_layers": 2,
        "hidden_size": 16, "projection_dim": POOLED, "num_classes": 4,
    }  # fmt: skip
    return transformers.ClapModel(
        transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=POOLED)
    ).eval()


def t5(rows: int, width: int) -> transformers.T5EncoderModel:
    """A T5 encoder of two layers."""
    config = transformers.T5Config(vocab_size=rows, d_model=width, d_kv=width // 2, d_ff=32, num_layers=2, num_heads=2)
    return transformers.T5EncoderModel(config).eval()


def _mel_parts() -> dict:
    """What MusicLDM and AudioLDM2 have in common: latents of mel spectrograms, and a vocoder."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
    )
    vocoder = transformers.SpeechT5HifiGan(
        transformers.SpeechT5HifiGanConfig(
            model_in_dim=8,
            sampling_rate=16000,
            upsample_initial_channel=8,
            upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1, 3]],
            normalize_before=False,
            initializer_range=0.5,
        )
    )
    return {
        "vae": vae.eval(),
        "vocoder": vocoder.eval(),
        "feature_extractor": transformers.ClapFeatureExtractor(),
        "scheduler": diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
    }


def musicldm() -> diffusers.MusicLDMPipeline:
    """A stock MusicLDM, whose text reaches the UNet as one vector beside the time embedding."""
    parts, tok = _mel_parts(), roberta_tokenizer(POOLED)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=(8, 16),
        attention_head_dim=4,
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=POOLED,
        class_embeddings_concat=True,
    )
    return _finish(diffusers.MusicLDMPipeline(text_encoder=clap(len(tok)), tokenizer=tok, unet=unet, **parts))


def audioldm2(width: int = 16) -> diffusers.AudioLDM2Pipeline:
    """A stock AudioLDM2: CLAP and T5 together prompt a GPT-2, and the UNet reads what that says and the T5 states."""
    parts, tok, tok_2 = _mel_parts(), roberta_tokenizer(64), t5_tokenizer(64)
    gpt = transformers.GPT2Config(
        vocab_size=8, n_embd=16, n_layer=2, n_head=2, n_positions=200, bos_token_id=0, eos_token_id=0
    )
    gpt.max_new_tokens = 4
    unet = AudioLDM2UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=([None, 16, width], [None, 16, width]),
        attention_head_dim=4,
    )
    pipe = diffusers.AudioLDM2Pipeline(
        text_encoder=clap(len(tok)),
        tokenizer=tok,
        text_encoder_2=t5(len(tok_2), width),
        tokenizer_2=tok_2,
        projection_model=AudioLDM2ProjectionModel(POOLED, width, 16),
        language_model=transformers.GPT2LMHeadModel(gpt).eval(),
        unet=unet,
        **parts,
    )
    return _finish(pipe)


def stable_audio(width: int = 16) -> diffusers.StableAudioPipeline:
    """A stock StableAudio: masked T5 states, projected, and two tokens for the start and end seconds."""
    torch.manual_seed(0)
    tok = t5_tokenizer(40)
    transformer = diffusers.StableAudioDiTModel(
        sample_size=4,
        in_channels=3,
        out_channels=3,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        cross_attention_dim=8,
        time_proj_dim=8,
        global_states_input_dim=16,
        cross_attention_input_dim=8,
    )
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    pipe = diffusers.StableAudioPipeline(
        vae=vae.eval(),
        text_encoder=t5(len(tok), width),
        tokenizer=tok,
        projection_model=StableAudioProjectionModel(width, 8, min_value=0, max_value=32),
        transformer=transformer.eval(),
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(
            solver_order=2, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
        ),
    )
    return _finish(pipe)


def waveforms(pipe, prompt="a red fox", **options) -> torch.Tensor:
    """Two steps from fixed noise, as `(waveforms, ...)`."""
    inputs = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "pt"}
    inputs |= {"generator": torch.Generator().manual_seed(0), **options}
    return pipe(prompt, **inputs).audios


@torch.no_grad()
def _finish(pipe):
    pipe.set_progress_bar_config(disable=True)
    # Random weights hardly hear the text; larger ones tell mistakes apart.
    for name in ("text_encoder", "text_encoder_2", "transformer"):
        for parameter in getattr(pipe, name).parameters() if getattr(pipe, name, None) else ():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return pipe
