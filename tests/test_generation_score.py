import json

import pytest
import tiny
import torch

from textcond import TextEncoder
from textcond.apps.training import _generation
from textcond.evaluation import GENERATION
from textcond.files import read_tensors
from textcond.pipelines import generation_score
from textcond.training import Recipe, load_recipe, train
from textcond.training.recipe import Data, Evaluation, Stage

WORDS = ["red", "green", "blue", "big", "fox", "dog", "bird", "house", "tree", "apple"]
PROMPTS = [f"{one} {two} {three}" for one in WORDS[:4] for two in WORDS[4:] for three in WORDS[4:7]]
OPTIONS = {
    "held_out": PROMPTS[::9], "token_steps": 5, "num_inference_steps": 2, "closed_form_prompts": 64,
    "batch_size": 8, "call": {"height": 16, "width": 16},
}  # fmt: skip


@pytest.fixture(scope="module")
def score():
    return generation_score(tiny.stable_diffusion(), PROMPTS, **OPTIONS)


def test_every_held_out_prompt_is_scored_and_again_the_same(score):
    encoder = tiny.text_encoder("bert")
    first, again = score(encoder), score(encoder)
    assert list(first) == PROMPTS[::9]
    assert first == again


def test_an_encoder_that_reads_nothing_scores_less(score):
    deaf = tiny.text_encoder("bert")
    with torch.no_grad():
        deaf.backbone.get_input_embeddings().weight.zero_()
    heard, unheard = score(tiny.text_encoder("bert")), score(deaf)
    assert sum(heard.values()) > sum(unheard.values())


def test_held_out_prompts_are_not_trained_on():
    with pytest.raises(ValueError, match="held"):
        generation_score(tiny.stable_diffusion(), PROMPTS[:4], PROMPTS[:4])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"guidance_scale": 1}, r"guidance_scale=1: give two numbers, as \[2, 5\]"),
        ({"guidance_scale": [1, 2, 3]}, r"guidance_scale=\[1, 2, 3\]: give two numbers"),
        ({"held_out": 8}, "held_out=8: give a text file with a prompt a line"),
        ({"prompts": [1, "a fox"]}, "prompts=1: give a text file with a prompt a line"),
        ({"prompts": {"file": "p.txt"}}, "prompts={'file': 'p.txt'}: give a text file"),
        ({"token_steps": 1.5}, "token_steps=1.5: give a whole number"),
        ({"token_steps": True}, "token_steps=True: give a whole number"),
        ({"learning_rate": "fast"}, "learning_rate='fast': give a number"),
        ({"train_backbone": "no"}, "train_backbone='no': give true or false"),
        ({"call": 16}, "call=16: give a table"),
        ({"slot": 2}, "slot=2: give a string"),
        ({"batch_size": 0}, "batch_size=0: give 1 or more"),
        ({"steps": 5}, "steps=5: there is no such option, choose from slot, "),
        ({"pipe": "p"}, "pipe='p': there is no such option"),
        ({"pipeline": 3}, "pipeline=3: give a folder or a hub id"),
    ],
)
def test_an_option_of_the_wrong_kind_in_a_recipe_is_named(monkeypatch, table, message):
    monkeypatch.setattr("textcond.apps.loading.load_pipeline", lambda name, dtype: tiny.stable_diffusion())
    with pytest.raises(ValueError, match=rf"^evaluation\.generation: {message}"):
        _generation({"prompts": PROMPTS} | table)


def test_a_score_in_a_recipe_needs_prompts_and_takes_what_toml_writes(monkeypatch):
    monkeypatch.setattr("textcond.apps.loading.load_pipeline", lambda name, dtype: tiny.stable_diffusion())
    with pytest.raises(ValueError, match=r"evaluation\.generation: there are no prompts"):
        _generation({"token_steps": 5})
    assert callable(_generation({"prompts": PROMPTS, "guidance_scale": [2, 5], "learning_rate": 1, "slot": None}))


@pytest.fixture
def recipe(tmp_path):
    tiny.text_encoder("bert").save_pretrained(tmp_path / "base")
    pairs = [{"query": f"the {word}", "pos": [f"{word} picture"]} for word in WORDS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    stage = Stage([Data(str(tmp_path / "pairs.jsonl"))], steps=4, batch_size=4, learning_rate=1e-3)
    evaluation = Evaluation(generation={"prompts": "prompts.txt"}, every=2, metric=GENERATION, patience=1)
    return Recipe(str(tmp_path / "base"), [stage], evaluation=evaluation)


def test_training_keeps_the_encoder_that_draws_best_and_stops_when_drawing_gets_worse(tmp_path, recipe):
    scores = iter([0.5, 0.9, 0.1, 0.2])  # base, then step 2, then worse

    def generation(encoder: TextEncoder) -> dict[str, float]:
        value = next(scores)
        return {"a": value, "b": value}

    recipe.stages[0].steps = 6
    out = train(recipe, tmp_path / "out", generation)
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [row[GENERATION] for row in log if GENERATION in row] == [0.5, 0.9, 0.1]
    assert max(row["step"] for row in log) == 4
    kept = next((tmp_path / "out" / "checkpoint").glob("best-*"))
    assert kept.name == "best-0-2"
    best, given = (TextEncoder.from_pretrained(folder) for folder in (kept, out))
    assert best.weights_hash() == given.weights_hash()
    assert "| generation x 100 |" in (out / "README.md").read_text()


def test_a_real_score_leaves_what_is_trained_alone(tmp_path, recipe, score):
    recipe.evaluation.patience = None
    train(recipe, tmp_path / "scored", score)
    train(Recipe(recipe.model, recipe.stages), tmp_path / "alone")
    one, two = (read_tensors(tmp_path / name / "checkpoint" / "state-0-4.safetensors") for name in ("scored", "alone"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_recipe_that_asks_for_it_is_refused_without(tmp_path, recipe):
    with pytest.raises(ValueError, match="go together"):
        train(recipe, tmp_path / "out")
    other = Recipe(recipe.model, recipe.stages, evaluation=Evaluation(generation={}, metric="nDCG@10"))
    with pytest.raises(ValueError, match="no task is scored by it"):
        train(other, tmp_path / "other", lambda encoder: {"a": 1.0})


def test_the_table_is_read_from_toml(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text(
        'model = "base"\n[evaluation]\nmetric = "generation"\ngeneration = {prompts = "p.txt", token_steps = 50}\n'
        '[[stages]]\nsteps = 1\nbatch_size = 2\ndata = [{path = "pairs.jsonl"}]\n'
    )
    assert load_recipe(file).evaluation.generation == {"prompts": "p.txt", "token_steps": 50}
