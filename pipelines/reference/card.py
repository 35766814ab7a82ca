"""The model card that ships with the weights: data, attribution, recipe, measured scores, limits."""

from __future__ import annotations

ARTWORK = """\
| style word | icon set (npm) | artwork by | licence |
|---|---|---|---|
| noto | `@iconify-json/noto` | Noto Emoji, Google | Apache-2.0 |
| blob | `@iconify-json/noto-v1` | Noto Emoji (first design), Google | Apache-2.0 |
| twemoji | `@iconify-json/twemoji` | Twemoji, Twitter and contributors | CC-BY-4.0 |
| fluent | `@iconify-json/fluent-emoji` | Fluent Emoji, Microsoft | MIT |
| flat | `@iconify-json/fluent-emoji-flat` | Fluent Emoji (flat), Microsoft | MIT |
| firefox | `@iconify-json/fxemoji` | FxEmojis, Mozilla | Apache-2.0 |
| - (evaluation only) | `@iconify-json/emojione` | EmojiTwo (Emoji One 2) | CC-BY-4.0 |"""

CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
language: en
---
# emoji: the reference model of textcond

A small complete text-to-image model: 128x128 pictures of {concepts} things in six drawing styles on eleven backgrounds.
It loads in a stock `StableDiffusionPipeline`, runs on one CPU core, and exists so that everything about text encoders
can be tried, tested and compared without a GPU or a model hub.

```python
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained("emoji")
pipe("fox, noto style, on a blue background", num_inference_steps=25, guidance_scale=4).images[0]
```

![64 unselected samples](samples.png)

64 unselected samples: evenly spaced concepts, styles in turn, seeds 1000 to 1063, 25 steps, guidance 4. Row by row:
{prompts}.

## Scores

Measured by `textcond reference build --stage evaluate`: 95% bootstrap intervals over pictures, nothing selected, 25
steps, guidance 4. Style prompts: "{{name}}, {{style}} style", two a concept. Combinations add a background colour, one
a concept. Top-1 and top-5 are among the {concepts} concepts, `top1_all` among all 1,044 that the judge knows. The judge
is a classifier trained apart, on the same vendors' artwork; its own accuracy, on drawings that it trained on, disturbed
and passed through the autoencoder, bounds what its scores mean. The pipeline was judged in float32, before its weights
were rounded to the float16 that ships.

{scores}

## Data

Emoji artwork, rendered at 128x128 and composited on white and ten named colours; names and keywords from Unicode CLDR
48 (Unicode-3.0), groups from `unicode-emoji-json` (MIT). The pictures in `index/` are downscaled copies of this artwork
under the licences named here.

{artwork}

Held out of training: the Emoji One vendor altogether, and one in five subject-style-colour combinations.
Captions: "{{name}}", "{{name}}, {{style}} style", "{{name}} on a {{colour}} background", both together, and keywords.

## Recipe

`textcond reference build --out DIR` makes everything from nothing (CPU hours, resumable):
- autoencoder: `AutoencoderTiny`, f8, 8 latent channels, 0.5M weights; squared error + L1 + gradient L1 on 64-pixel
  crops, noise on the latents
- text encoder: CLIP text transformer, 4 layers, width 256, 32 tokens, own vocabulary, English only; InfoNCE in both
  directions against an open_clip ModifiedResNet, with look-alike and read-alike concepts in each batch, one false
  caption a picture (wrong style, colour or subject), and a mask for captions that are true of several pictures
- denoiser: `UNet2DConditionModel`, 21M weights, v-prediction, zero-terminal SNR, trailing timesteps, weights
  min(SNR, 5) + 1 on the picture's error, stratified timesteps, EMA, 10% empty captions
- all by Muon on matrices and convolutions with AdamW for the rest, bfloat16 autocast, on two CPU cores

`text_encoder/` is a sentence-transformers folder as well: its normalised end-of-text vectors search `index/`.

## Limits

It knows the {concepts} things it was trained on, in English; other words give a mixture of what they resemble. It
cannot count, compose scenes, write, or draw people. Fine detail is soft. Prompts are cut at 32 tokens. Style words name
the vendors' design families for the sake of comparison; the vendors have not endorsed this model.
"""


def model_card(scores: dict, prompts: list[str]) -> str:
    """The card in Markdown, from what stage "evaluate" measured."""
    rows = ["| what | score | 95% interval |", "|---|---|---|"]
    for name, value in scores.items():
        if name == "generated":
            for kind, hits in value.items():
                rows += [
                    f"| {kind}: {key} | {mean:.1%} | {low:.1%} - {high:.1%} |"
                    for key, (mean, low, high) in hits.items()
                ]
        elif isinstance(value, dict):
            rows += [f"| {name}: {key} top-1 | {number:.1%} | |" for key, number in value.items()]
        elif isinstance(value, float):
            rows.append(f"| {name} | {value:.1%} | |" if value <= 1 else f"| {name} | {value:.1f} | |")
    return CARD.format(concepts=scores["concepts"], scores="\n".join(rows), artwork=ARTWORK, prompts="; ".join(prompts))
