"""Recipes: what is refused and by which name, overrides, what ships, and what a resumption is told."""

import pytest

from textcond.training import Lora, Recipe, load_recipe
from textcond.training.recipe import SHIPPED, changes

PLAIN = """
model = "base"
heads = ["sparse"]

[lora]
r = 4

[[stages]]
name = "first"
steps = 5
batch_size = 8
learning_rate = 1
data = [{path = "a.jsonl", weight = 2}]
loss = [{name = "infonce", temperature = 0.1}, {name = "listwise_kl", weight = 0.5}]

[[stages]]
steps = 7
batch_tokens = 100
data = [{path = "b.csv", format = "csv"}]
"""


@pytest.fixture
def write(tmp_path):
    def written(text):
        (tmp_path / "recipe.toml").write_text(text, encoding="utf-8")
        return tmp_path / "recipe.toml"

    return written


def test_tables_become_dataclasses(write):
    recipe = load_recipe(write(PLAIN))
    assert recipe.lora == Lora(r=4)
    assert [stage.steps for stage in recipe.stages] == [5, 7]
    assert recipe.stages[0].data[0].weight == 2.0
    assert isinstance(recipe.stages[0].learning_rate, float)
    assert recipe.stages[0].loss[1] == {"name": "listwise_kl", "weight": 0.5}
    assert recipe.stages[1].loss["name"] == "infonce"
    assert (recipe.stages[1].batch_size, recipe.stages[1].batch_tokens) == (None, 100)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('model = "base"', 'model = "base"\nmodle = "x"', "no option 'modle'.*model"),
        ("r = 4", "rank = 4", "lora has no option 'rank'.*alpha"),
        ("steps = 7", "steps = 7\nstep = 1", r"stages\.1 has no option 'step'"),
        ("weight = 2", "wieght = 2", r"stages\.0, data\.0 has no option 'wieght'"),
        ("temperature", "temprature", "'temprature'"),
        ('name = "infonce"', 'name = "infonse"', "unknown loss 'infonse'"),
        ("steps = 7", 'steps = "7"', r"stages\.1, steps is '7': expected int"),
        ("steps = 7", "steps = 7.5", r"stages\.1, steps is 7\.5"),
        ("steps = 7", "steps = true", r"stages\.1, steps is True"),
        ("learning_rate = 1", "learning_rate = false", r"stages\.0, learning_rate is False"),
        ('heads = ["sparse"]', "heads = [1]", r"heads\.0 is 1: expected str"),
        ('heads = ["sparse"]', 'heads = ["dense"]', "heads.*dense"),
        ("[lora]\nr = 4", "", None),
        ("r = 4", 'r = "4"', "lora, r is '4'"),
        ('model = "base"', "", "lacks 'model'"),
        ("steps = 7", "", r"stages\.1 lacks 'steps'"),
        ('path = "b.csv", ', "", r"stages\.1, data\.0 lacks 'path'"),
        ("batch_tokens = 100", "", "batch_size or batch_tokens"),
        ("batch_tokens = 100", "batch_tokens = 100\nbatch_size = 2", "batch_size or batch_tokens"),
        ("steps = 7", "steps = 0", "steps from 1"),
        ("steps = 7", "steps = 7\nwarmup = 2", "warmup"),
        ("steps = 7", "steps = 7\nmini_batch = 0", "mini_batch=0"),
        ("steps = 7", "steps = 7\nmax_length = 0", "max_length=0"),
        ("r = 4", 'dtype = "float16"', "dtype is 'float16': use float32 or bfloat16"),
        ("weight = 2", 'on_error = "ignore"', r"a\.jsonl: on_error is 'ignore': use raise or skip"),
        ("weight = 2", 'options = {on_error = "skip"}', "put it beside path"),
        ("steps = 7", 'steps = 7\nschedule = "step"', "'step'.*linear, cosine, constant"),
        ("steps = 7", 'steps = 7\n[stages.mining]\ncorpus = "c"\noptions = {depht = 3}', "no option 'depht'"),
        ("steps = 7", "steps =", "is not TOML"),
    ],
)
def test_what_is_wrong_is_named(write, old, new, message):
    assert old in PLAIN
    text = PLAIN.replace(old, new)
    if "mining" in new:
        # a sub-table ends the keys of its stage: put it last
        text = PLAIN + new.replace(old, "")
    if message is None:
        assert load_recipe(write(text)).lora is None
        return
    with pytest.raises(ValueError, match=message):
        load_recipe(write(text))


def test_a_recipe_without_stages_or_data_is_refused(write):
    with pytest.raises(ValueError, match="stages"):
        load_recipe(write('model = "x"\nstages = []'))
    with pytest.raises(ValueError, match="no data"):
        load_recipe(write('model = "x"\n[[stages]]\nsteps = 1\nbatch_size = 2\ndata = []'))


def test_overrides_reach_any_place(write):
    recipe = load_recipe(
        write(PLAIN),
        [
            'model="other"',
            "stages.1.steps=9",
            "lora.alpha=64",
            "evaluation.patience=2",
            "stages.0.data.0.path=runs/some data.jsonl",
            "heads.0=tokens",
            "stages.0.loss={name = 'triplet'}",
        ],
    )
    assert recipe.model == "other"
    assert [stage.steps for stage in recipe.stages] == [5, 9]
    assert (recipe.lora.r, recipe.lora.alpha) == (4, 64)
    assert recipe.evaluation.patience == 2
    assert recipe.stages[0].data[0].path == "runs/some data.jsonl"
    assert recipe.heads == ["tokens"]
    assert recipe.stages[0].loss == {"name": "triplet"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "KEY=VALUE"),
        ("stages.5.steps=1", "no place 'stages.5.steps'"),
        ("stages.first.steps=1", "no place 'stages.first.steps'"),
        ("model.name=1", "no place 'model.name'"),
        ("stages.0.stepps=1", "no option 'stepps'"),
        ("stages.0.steps=many", "steps is 'many'"),
    ],
)
def test_an_override_that_goes_nowhere_is_refused(write, override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(write(PLAIN), [override])


def test_an_unknown_name_lists_what_ships():
    with pytest.raises(FileNotFoundError, match="no recipe nowhere") as error:
        load_recipe("nowhere")
    names = [file.stem for file in SHIPPED.glob("*.toml")]
    assert names
    assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.toml")), ids=lambda file: file.stem)
def test_every_shipped_recipe_loads_by_its_name(file):
    recipe = load_recipe(file.stem)
    assert isinstance(recipe, Recipe)
    assert recipe.stages


def test_changes_name_key_old_and_new(write):
    before = load_recipe(write(PLAIN)).to_dict()
    assert changes(before, load_recipe(write(PLAIN)).to_dict()) == []
    now = load_recipe(write(PLAIN), ["stages.1.steps=9", 'stages.0.data.0.path="c.jsonl"']).to_dict()
    assert changes(before, now) == [
        'stages.0.data.0.path: was "a.jsonl", is "c.jsonl"',
        "stages.1.steps: was 7, is 9",
    ]
    assert changes({"a": {"b": 1}, "c": []}, {"a": {}, "d": 2}) == ["a.b: was 1, is null", "d: was null, is 2"]
    # what changes no weight may change
    assert changes(before, load_recipe(write(PLAIN), ["save_every=1", "tensorboard=true"]).to_dict()) == []
    # a table that came or went counts, be it empty
    assert changes({"lora": None}, {"lora": {"r": 4}}) == ["lora.r: was null, is 4"]
