"""The whole trainer on a tiny encoder: what it writes, and that no interruption changes a weight."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tiny import text_encoder
from torch import nn

from textcond import TextEncoder
from textcond.evaluation import RetrievalTask, Scores
from textcond.files import read_tensors, write_mark
from textcond.training import Data, Evaluation, Lora, Mining, Recipe, Stage, train, trainer
from textcond.training.card import model_card

WORDS = ["fox", "bird", "winter", "dog", "apple", "river", "stone", "cloud", "lamp", "horse", "tree", "moon"]
PAIR = {"name": "infonce", "temperature": 0.1}


def write_data(folder: Path) -> Path:
    """Rows with 0 to 3 explicit negatives and a teacher's scores."""
    path = folder / "pairs.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for row, word in enumerate(WORDS):
            negatives = [f"{WORDS[(row + 1 + number) % 12]} and {word[::-1]}" for number in range(row % 4)]
            values = {"query": f"what {word}", "pos": [f"{word} is {'very ' * (row % 3)}{word}"], "neg": negatives}
            values |= {"pos_scores": [3.0], "neg_scores": [1.0 / (1 + number) for number in range(row % 4)]}
            file.write(json.dumps(values) + "\n")
    return path


def save_base(folder: Path, dropout: float) -> Path:
    made = text_encoder(prompts={"query": "q: ", "document": "d: "})
    config = made.backbone.config
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("training")
    save_base(root / "base", 0.1)
    save_base(root / "dry", 0.0)
    write_data(root)
    return root


def two_stages(root: Path, model: str = "base", **options) -> Recipe:
    """All that has a state: dropout, drawn negatives, batches by length, a learned temperature, two optimizers."""
    data = [Data(str(root / "pairs.jsonl"))]
    first = Stage(
        data, 4, "first", loss=PAIR, batch_tokens=300, mini_batch=3, negatives=1, learning_rate=1e-3, warmup=0.5
    )
    loss = [{**PAIR, "learn_temperature": True}, {"name": "listwise_kl", "weight": 0.5, "temperature": 0.1}]
    second = Stage(data, 4, "second", loss=loss, batch_size=5, negatives=2, learning_rate=1e-3, schedule="cosine")
    return Recipe(str(root / model), [first, second], **{"save_every": 1000.0, **options})


def one_stage(root: Path, steps=3, loss=PAIR, model="base", learning_rate=1e-3, **options) -> Recipe:
    stage = Stage(
        [Data(str(root / "pairs.jsonl"))], steps, "only", loss=loss, batch_size=6, learning_rate=learning_rate
    )
    return Recipe(str(root / model), [stage], **{"save_every": 1000.0, **options})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.rglob("*.safetensors"))
    assert files
    return {f"{file.relative_to(folder)} {name}": tensor for file in files for name, tensor in load_file(file).items()}


def assert_equal(one: Path, other: Path):
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def mark(out: Path) -> dict:
    return json.loads((out / "checkpoint" / "mark.json").read_text())


def at_step(monkeypatch, count, action):
    """Do something at the count-th step from now, when its gradients are there."""
    calls, schedule = [], trainer.schedule

    def hooked(step, stage):
        calls.append(step)
        if len(calls) == count:
            action()
        return schedule(step, stage)

    monkeypatch.setattr(trainer, "schedule", hooked)


@pytest.fixture(scope="module")
def whole(folders):
    """The run that nothing disturbed."""
    train(two_stages(folders), folders / "whole")
    return folders / "whole"


def test_it_learns_and_the_folder_loads_everywhere(folders, tmp_path):
    out = train(one_stage(folders, 24), tmp_path)
    assert out == tmp_path / "encoder"
    losses = [row["loss"] for row in log(tmp_path)]
    assert len(losses) == 24
    assert np.mean(losses[-6:]) < 0.7 * np.mean(losses[:6])
    encoder = TextEncoder.from_pretrained(out)
    before = TextEncoder.from_pretrained(folders / "base")
    vectors = encoder.encode(["what fox"], kind="query")
    assert not np.allclose(vectors, before.encode(["what fox"], kind="query"), atol=1e-2)
    from sentence_transformers import SentenceTransformer

    other = SentenceTransformer(str(out), device="cpu")
    np.testing.assert_allclose(other.encode(["what fox"], prompt_name="query"), vectors, atol=1e-5)
    card = (out / "README.md").read_text()
    assert card.startswith("---\n")
    assert "sentence-transformers" in card
    assert '"temperature": 0.1' in card


def test_both_stages_run_with_their_own_loss_and_schedule(whole):
    rows = log(whole)
    assert [(row["stage"], row["step"]) for row in rows] == [(stage, step) for stage in (0, 1) for step in (1, 2, 3, 4)]
    assert [row["learning_rate"] for row in rows[:4]] == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4])
    stored = read_tensors(whole / "checkpoint" / mark(whole)["file"])
    assert stored["parameter.loss.losses.0.log_temperature"] != torch.tensor(0.1).log()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("count", [2, 4, 6])
def test_an_interrupted_run_goes_on_to_the_very_same_weights(folders, whole, tmp_path, monkeypatch, count, number):
    handlers = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, count, lambda: signal.raise_signal(number))
        with pytest.raises(KeyboardInterrupt):
            train(two_stages(folders), tmp_path)
    assert signal.getsignal(number) is handlers
    assert (mark(tmp_path)["stage"], mark(tmp_path)["step"]) == ((count - 1) // 4, (count - 1) % 4 + 1)
    assert not (tmp_path / "encoder").exists()
    train(two_stages(folders), tmp_path)
    assert_equal(tmp_path / "encoder", whole / "encoder")
    figures = [[(row["stage"], row["step"], row["loss"]) for row in log(out)] for out in (tmp_path, whole)]
    assert figures[0] == figures[1]


def test_a_second_signal_stops_at_once(folders, tmp_path, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_step(monkeypatch, 2, twice)
    with pytest.raises(KeyboardInterrupt):
        train(one_stage(folders), tmp_path)
    assert len(log(tmp_path)) == 1


def test_a_finished_run_is_left_as_it_is(folders, whole):
    before, rows = weights(whole / "encoder"), len(log(whole))
    train(two_stages(folders), whole)
    assert len(log(whole)) == rows
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(whole / "encoder").items())


def test_another_seed_gives_other_weights(folders, whole, tmp_path):
    train(two_stages(folders, seed=1), tmp_path)
    left, right = weights(tmp_path / "encoder"), weights(whole / "encoder")
    assert any(not torch.equal(left[name], right[name]) for name in left)


def test_a_changed_recipe_is_refused_by_its_key(folders, whole):
    recipe = two_stages(folders)
    recipe.stages[1].steps = 9
    with pytest.raises(ValueError, match=r"another recipe \(stages\.1\.steps: was 4, is 9\)"):
        train(recipe, whole)
    assert json.loads((whole / "recipe.json").read_text())["stages"][1]["steps"] == 4


def test_an_infinite_weight_stops_the_run_and_leaves_the_checkpoint(folders, tmp_path, monkeypatch):
    recipe = one_stage(folders, 4, save_every=0.0)
    train(recipe, tmp_path / "whole")
    backward, calls = trainer.backward, []

    def spoilt(encoder, *args, **options):
        calls.append(encoder)
        if len(calls) == 3:
            with torch.no_grad():
                encoder.backbone.embeddings.word_embeddings.weight[7:] = float("inf")
        return backward(encoder, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "backward", spoilt)
        with pytest.raises(FloatingPointError, match=r"stage 0 \(only\), step 2, rows \[\d+(, \d+){5}\] of .*pairs"):
            train(recipe, tmp_path / "cut")
    assert mark(tmp_path / "cut")["step"] == 2
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "cut" / "checkpoint").values())
    train(recipe, tmp_path / "cut")
    assert_equal(tmp_path / "cut" / "encoder", tmp_path / "whole" / "encoder")


def test_a_gradient_that_is_not_finite_takes_no_step(folders, tmp_path, monkeypatch):
    backward = trainer.backward

    def spoilt(encoder, *args, **options):
        value = backward(encoder, *args, **options)
        next(encoder.parameters()).grad[0] = float("nan")
        return value

    monkeypatch.setattr(trainer, "backward", spoilt)
    with pytest.raises(FloatingPointError, match=r"step 0, rows .*the gradient is nan"):
        train(one_stage(folders), tmp_path)


def test_lora_trains_the_adapter_alone_and_saves_it_merged(folders, tmp_path, monkeypatch):
    recipe = one_stage(folders, 4, lora=Lora(r=2, alpha=8, dropout=0.1), learning_rate=1e-2)
    running = trainer.Trainer(recipe, tmp_path / "whole")
    assert running._trained(nn.Module())
    assert all(".lora_" in name for name in running._trained(nn.Module()))
    out = running.train()
    base, trained = weights(folders / "base"), weights(out)
    assert base.keys() == trained.keys()
    changed = {name for name in base if not torch.equal(base[name], trained[name])}
    assert any("query.weight" in name for name in changed)
    assert all(name.endswith("dense.weight") or ".self." in name for name in changed)
    running.encoder.eval()
    merged = TextEncoder.from_pretrained(out)
    with torch.no_grad():
        torch.testing.assert_close(
            merged.features(["a fox"], kind="query").dense,
            running.encoder.features(["a fox"], kind="query").dense,
            atol=1e-5,
            rtol=1e-4,
        )
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "cut")
    assert_equal(train(recipe, tmp_path / "cut"), out)


def test_new_heads_are_trained_and_saved(folders, tmp_path):
    recipe = one_stage(folders, 2, heads=["sparse", "tokens"], loss={"name": "m3", "temperature": 0.1})
    running = trainer.Trainer(recipe, tmp_path)
    before = {name: tensor.clone() for name, tensor in running.encoder.heads.state_dict().items()}
    after = TextEncoder.from_pretrained(running.train()).heads.state_dict()
    assert before.keys() == after.keys()
    assert {name.split(".")[0] for name in after} == {"sparse", "tokens"}
    assert all(not torch.equal(before[name], after[name]) for name in after if name.endswith("weight"))


def test_a_bfloat16_base_under_a_float32_adapter_is_trained_and_saved_whole(folders, tmp_path):
    recipe = one_stage(folders, 6, lora=Lora(r=2, alpha=8, dtype="bfloat16"), heads=["sparse"], learning_rate=1e-2)
    running = trainer.Trainer(recipe, tmp_path)
    types = {name: parameter.dtype for name, parameter in running.encoder.named_parameters()}
    trained = {name.removeprefix("encoder.") for name in running._trained(nn.Module())}
    assert {types[name] for name in trained} == {torch.float32}
    assert {dtype for name, dtype in types.items() if name not in trained} == {torch.bfloat16}
    out = running.train()
    before, after = TextEncoder.from_pretrained(folders / "base"), TextEncoder.from_pretrained(out)
    vectors = {name: made.encode(["what fox"], kind="query") for name, made in (("before", before), ("after", after))}
    now = running.encoder.encode(["what fox"], kind="query")
    assert np.abs(vectors["after"] - now).max() < 0.02 < np.abs(vectors["before"] - now).max()
    name = next(name for name in weights(out) if name.endswith("attention.self.query.weight"))
    # the small change is there, which rounding to bfloat16 would take away
    assert not torch.equal(weights(out)[name].bfloat16().float(), weights(out)[name])


# -- data ------------------------------------------------------------------------------------------------------------


def test_batch_tokens_bound_all_texts_that_a_step_encodes(folders, tmp_path, monkeypatch):
    data, bound = folders / "long.jsonl", 600
    with data.open("w", encoding="utf-8") as file:
        for row, word in enumerate(WORDS * 3):
            negatives = [f"{word} {row} " + "dog " * ((row * number) % 7) for number in range(5)]
            values = {"query": f"{word} {row}", "pos": [f"about {word} {row}"], "neg": negatives}
            file.write(json.dumps(values | ({"prompt": "find a very long one"} if row % 3 else {})) + "\n")
    template = "Instruct: {prompt} Query: "
    stage = Stage([Data(str(data), prompt_template=template)], 12, loss=PAIR, batch_tokens=bound, negatives=3)
    backward, seen = trainer.backward, []

    def counted(encoder, loss, batch, *args, **options):
        prompts = [encoder.config.prompts["query"] if prompt is None else prompt for prompt in batch.prompts]
        texts = [prompt + query for prompt, query in zip(prompts, batch.queries)]
        texts += [encoder.config.prompts["document"] + text for text in batch.documents]
        seen.append((len(batch.queries), sum(map(len, encoder.tokenizer(texts)["input_ids"]))))
        return backward(encoder, loss, batch, *args, **options)

    monkeypatch.setattr(trainer, "backward", counted)
    train(Recipe(str(folders / "base"), [stage]), tmp_path)
    assert all(tokens <= bound or rows == 1 for rows, tokens in seen), seen
    assert sum(rows > 1 for rows, _ in seen) > 6
    assert max(tokens for _, tokens in seen) > bound / 2


def test_a_stage_has_its_own_length_and_what_is_scored_and_saved_the_encoders(folders, task, tmp_path, monkeypatch):
    recipe = two_stages(folders, max_length=12, evaluation=Evaluation([str(task)]))
    recipe.stages[0].max_length = 5
    seen = []

    def watched(function, name):
        def call(encoder, *args, **options):
            seen.append((name, running.stage, encoder.max_length))
            return function(encoder, *args, **options)

        return call

    monkeypatch.setattr(trainer, "backward", watched(trainer.backward, "step"))
    monkeypatch.setattr(trainer, "evaluate_retrieval", watched(trainer.evaluate_retrieval, "score"))
    running = trainer.Trainer(recipe, tmp_path)
    out = running.train()
    assert set(seen) == {("step", 0, 5), ("step", 1, 12), ("score", 0, 12), ("score", 1, 12)}
    assert TextEncoder.from_pretrained(out).max_length == 12
    recipe.stages[0].max_length = 2
    with pytest.raises(ValueError, match="max_length=2 leaves no room for a text beside 2 special"):
        train(recipe, tmp_path / "short")


@pytest.mark.parametrize("mined", [False, True])
def test_malformed_rows_are_skipped_where_the_recipe_says_so(folders, tmp_path, mined):
    (tmp_path / "data.jsonl").write_text((folders / "pairs.jsonl").read_text() + '{"query": "no positive"}\n')
    mining = Mining(str(write_task(tmp_path / "mined") / "corpus.jsonl"), options={"num_negatives": 1})
    recipe = one_stage(folders, 1)
    recipe.stages[0].mining = mining if mined else None
    recipe.stages[0].data = [Data(str(tmp_path / "data.jsonl"))]
    with pytest.raises(ValueError, match=r"data\.jsonl:13: no key 'pos'"):
        train(recipe, tmp_path / "out")
    recipe.stages[0].data[0].on_error = "skip"
    assert train(recipe, tmp_path / "other").is_dir()


# -- resuming --------------------------------------------------------------------------------------------------------


def cut(recipe: Recipe, out: Path, monkeypatch, count: int) -> None:
    """Train until the end of the count-th step."""
    with monkeypatch.context() as patch:
        at_step(patch, count, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt):
            train(recipe, out)


def test_what_changes_no_weight_may_change_on_the_way(folders, whole, tmp_path, monkeypatch):
    cut(two_stages(folders), tmp_path, monkeypatch, 3)
    train(two_stages(folders, save_every=0.0, tensorboard=True), tmp_path)
    assert_equal(tmp_path / "encoder", whole / "encoder")
    assert json.loads((tmp_path / "recipe.json").read_text())["tensorboard"] is True
    assert list((tmp_path / "tensorboard").iterdir())


def test_data_that_changed_at_equal_length_is_refused_and_a_new_date_is_not(folders, whole, tmp_path, monkeypatch):
    data, recipe = tmp_path / "pairs.jsonl", two_stages(folders)
    before = (folders / "pairs.jsonl").read_text()
    data.write_text(before)
    for stage in recipe.stages:
        stage.data[0].path = str(data)
    cut(recipe, tmp_path / "out", monkeypatch, 2)
    data.write_text(before.replace("what bird", "what birt"))
    with pytest.raises(ValueError, match=r"the saved sampler had content = .*pairs\.jsonl"):
        train(recipe, tmp_path / "out")
    data.write_text(before)
    os.utime(data, (1, 1))
    train(recipe, tmp_path / "out")
    assert_equal(tmp_path / "out/encoder", whole / "encoder")


@pytest.mark.parametrize("saved", [0, 2])
def test_no_line_of_the_log_repeats_after_a_kill(folders, tmp_path, monkeypatch, saved):
    save, calls = trainer.Trainer._save_checkpoint, []

    def killed(running, *args):
        calls.append(running.step)
        if len(calls) > saved:
            raise RuntimeError("killed")
        save(running, *args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_save_checkpoint", killed)
        with pytest.raises(RuntimeError, match="killed"):
            train(one_stage(folders, 4, save_every=0.0), tmp_path)
    assert len(log(tmp_path)) == saved + 1
    train(one_stage(folders, 4, save_every=0.0), tmp_path)
    assert [row["step"] for row in log(tmp_path)] == [1, 2, 3, 4]


def test_it_trains_outside_of_the_main_thread(folders, tmp_path):
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(train, one_stage(folders, 1), tmp_path).result().is_dir()


# -- evaluation ------------------------------------------------------------------------------------------------------


def write_task(folder: Path) -> Path:
    """A BEIR folder."""
    (folder / "qrels").mkdir(parents=True)
    corpus = [json.dumps({"_id": f"d{row}", "title": "", "text": f"{word} is"}) for row, word in enumerate(WORDS)]
    queries = [json.dumps({"_id": f"q{row}", "text": f"what {word}"}) for row, word in enumerate(WORDS)]
    (folder / "corpus.jsonl").write_text("\n".join(corpus), encoding="utf-8")
    (folder / "queries.jsonl").write_text("\n".join(queries), encoding="utf-8")
    qrels = "".join(f"q{row}\td{row}\t1\n" for row in range(12))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def task(folders):
    return write_task(folders / "task")


def test_scores_are_logged_and_in_the_card(folders, task, tmp_path):
    recipe = one_stage(folders, 2, evaluation=Evaluation([str(task)]))
    out = train(recipe, tmp_path)
    scores = [row["nDCG@10"] for row in log(tmp_path) if "nDCG@10" in row]
    assert len(scores) == 2
    from textcond.evaluation import evaluate_retrieval

    for folder, score in zip((folders / "base", out), scores):
        found = evaluate_retrieval(TextEncoder.from_pretrained(folder), RetrievalTask.load(task))
        assert found.mean("nDCG@10") == pytest.approx(score, abs=1e-6)
    card = (out / "README.md").read_text()
    assert "base" in card
    assert f"| {100 * scores[0]:.1f} |" in card
    assert f"| {100 * scores[1]:.1f} (" in card
    # the card is public: names of files, no place on this machine
    assert str(folders) not in card
    assert '"path": "pairs.jsonl"' in card
    assert "# Fine-tuned from base\n" in card
    assert '"tasks": [\n   "task"\n' in card


def test_a_card_keeps_hub_ids_and_no_path(folders, tmp_path):
    recipe = two_stages(folders, "dry")
    recipe.model, recipe.stages[0].teacher = "organisation/model", f"open_clip:local-dir:{tmp_path}/clip"
    recipe.stages[0].guide = str(folders / "dry")
    recipe.stages[1].mining = Mining("~/corpora/one.jsonl", cross_encoder="organisation/scorer")
    recipe.stages[1].data = [Data("data/relative.tsv", options={"run": "/runs/some.trec", "split": "train"})]
    card = model_card(recipe, None)
    for name in ("organisation/model", "open_clip:local-dir:clip", "dry", "one.jsonl", "organisation/scorer"):
        assert f'"{name}"' in card
    for name in ("relative.tsv", "some.trec", "train"):
        assert f'"{name}"' in card
    assert not [word for word in ("data/", "/runs", "corpora", str(folders), str(tmp_path)) if word in card]


def test_a_kill_between_the_best_and_its_checkpoint_leaves_the_older_pair(folders, task, tmp_path, monkeypatch):
    recipe = one_stage(folders, 3, evaluation=Evaluation([str(task)], every=1))
    script, kept = {1: 0.5, 2: 0.9}, {}

    def scripted(encoder, task):
        kept[running.step] = {name: tensor.clone() for name, tensor in encoder.backbone.state_dict().items()}
        return Scores(task.name, {"nDCG@10": {"q0": script.get(running.step, 0.1)}})

    def killed(path, content):
        if content.get("step") == 2:
            raise RuntimeError("killed")
        write_mark(path, content)

    monkeypatch.setattr(trainer, "evaluate_retrieval", scripted)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "write_mark", killed)
        running = trainer.Trainer(recipe, tmp_path)
        with pytest.raises(RuntimeError, match="killed"):
            running.train()
    assert mark(tmp_path)["step"] == 1
    assert mark(tmp_path)["kept"] == "best-0-1"
    script[2] = 0.2  # the same step may score otherwise where arithmetic is not exact
    running = trainer.Trainer(recipe, tmp_path)
    found = TextEncoder.from_pretrained(running.train()).backbone.state_dict()
    assert all(torch.equal(tensor, kept[1][name]) for name, tensor in found.items())
    assert [folder.name for folder in (tmp_path / "checkpoint").glob("best-*")] == ["best-0-1"]


@pytest.mark.parametrize("cut", [None, 3])
def test_the_best_is_kept_and_patience_ends_a_stage(folders, task, tmp_path, monkeypatch, cut):
    recipe = two_stages(folders, evaluation=Evaluation([str(task)], every=1, patience=2))
    recipe.stages[0].steps = 6
    script = {(0, 0): 0.1, (0, 1): 0.2, (0, 2): 0.6, (0, 3): 0.5, (0, 4): 0.6}
    kept = {}

    def scripted(encoder, task):
        assert not encoder.training
        place = (running.stage, running.step)
        kept[place] = {name: tensor.clone() for name, tensor in encoder.backbone.state_dict().items()}
        return Scores(task.name, {"nDCG@10": {"q0": script.get(place, 0.3)}})

    monkeypatch.setattr(trainer, "evaluate_retrieval", scripted)
    running = trainer.Trainer(recipe, tmp_path)
    if cut:
        with monkeypatch.context() as patch:
            at_step(patch, cut, lambda: signal.raise_signal(signal.SIGTERM))
            with pytest.raises(KeyboardInterrupt):
                running.train()
        running = trainer.Trainer(recipe, tmp_path)
    out = running.train()
    steps = [(row["stage"], row["step"]) for row in log(tmp_path) if "loss" in row]
    assert steps == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 1), (1, 2)]
    found = TextEncoder.from_pretrained(out).backbone.state_dict()
    assert all(torch.equal(tensor, kept[0, 2][name]) for name, tensor in found.items())
    assert any(not torch.equal(tensor, kept[0, 4][name]) for name, tensor in found.items())


# -- other processes -------------------------------------------------------------------------------------------------


def killed_recipe(root: Path) -> Recipe:
    return two_stages(root, save_every=0.0)


def process(mode: str, root: Path, out: Path) -> None:
    """Train in a process of its own, which ends as `mode` says."""
    write_tensors, write_mark, count = trainer.write_tensors, trainer.write_mark, []

    def tensors(path, content):
        count.append(path)
        if mode == "inside" and len(count) == 6:
            write_tensors(path.with_name("whole"), content)
            data = path.with_name("whole").read_bytes()
            path.with_name("whole").unlink()
            path.with_name(".textcond-killed.partial").write_bytes(data[: len(data) // 2])
            os._exit(9)
        write_tensors(path, content)
        if mode == "between" and len(count) == 6:
            os.kill(os.getpid(), signal.SIGKILL)

    def marked(path, content):
        write_mark(path, content)
        if mode == "after" and len(count) == 6:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.write_tensors, trainer.write_mark = tensors, marked
    if mode == "signal-one":
        schedule = trainer.schedule

        def hooked(step, stage):
            if step == 1 and os.environ["RANK"] == "1":
                signal.raise_signal(signal.SIGTERM)
            return schedule(step, stage)

        trainer.schedule = hooked
    recipe = two_stages(root, "dry") if mode in ("pair", "signal-one") else killed_recipe(root)
    joined = Accelerator(cpu=True) if mode == "pair" else None
    try:
        train(recipe, out)
    except KeyboardInterrupt:
        (out / f"stopped-{os.environ['RANK']}").touch()
    if joined:  # what launched the processes has more for them to do
        joined.wait_for_everyone()
        (out / f"went-on-{os.environ['RANK']}").touch()


def start(mode: str, root: Path, out: Path, processes: int = 1) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), __file__, mode, str(root), str(out)]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


@pytest.mark.slow
def test_a_kill_while_saving_costs_no_more_than_a_step(folders, tmp_path):
    modes = {"inside": (1, 1), "between": (1, 1), "after": (1, 2)}
    running = {mode: start(mode, folders, tmp_path / mode) for mode in modes}
    train(killed_recipe(folders), tmp_path / "whole")
    for mode, place in modes.items():
        errors, out = running[mode].communicate(timeout=200)[1], tmp_path / mode
        assert running[mode].returncode in (9, -signal.SIGKILL), errors[-3000:]
        assert (mark(out)["stage"], mark(out)["step"]) == place
        assert read_tensors(out / "checkpoint" / mark(out)["file"])
        train(killed_recipe(folders), out)
        assert_equal(out / "encoder", tmp_path / "whole" / "encoder")
        assert sorted(file.name.split("-")[0] for file in (out / "checkpoint").iterdir()) == ["mark.json", "state"]


@pytest.mark.slow
def test_two_processes_train_the_encoder_of_one(folders, tmp_path):
    pair = start("pair", folders, tmp_path / "pair", 2)
    train(two_stages(folders, "dry"), tmp_path / "one")
    errors = pair.communicate(timeout=200)[1]
    assert pair.returncode == 0, errors[-4000:]
    assert len(list((tmp_path / "pair").glob("went-on-*"))) == 2
    base, one, two = (
        weights(folder) for folder in (folders / "dry", tmp_path / "one/encoder", tmp_path / "pair/encoder")
    )
    way = torch.cat([(one[name] - base[name]).flatten() for name in base]).norm()
    apart = torch.cat([(one[name] - two[name]).flatten() for name in base]).norm()
    assert apart < 0.01 * way
    losses = [[row["loss"] for row in log(tmp_path / name)] for name in ("one", "pair")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(folders, tmp_path):
    pair = start("signal-one", folders, tmp_path, 2)
    errors = pair.communicate(timeout=100)[1]
    assert (tmp_path / "stopped-0").exists(), errors[-4000:]
    assert (tmp_path / "stopped-1").exists()
    assert (mark(tmp_path)["stage"], mark(tmp_path)["step"]) == (0, 2)


if __name__ == "__main__":
    process(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
