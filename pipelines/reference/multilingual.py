"""The multilingual encoder that ships: its own vocabulary, four layers of multilingual-e5-small, distilled on phrases.

One resumable recipe of stages: phrases -> vocabulary -> teacher -> distil -> finetune -> align -> pictures -> ship.

The student is an ELECTRA encoder, since that is BERT with an embedding table narrower than the layers: of 10.2 M
parameters the layers have 7.1 M, and a vocabulary for all languages of CLDR has to do with the rest. Layers are as wide
as the teacher's, so that they start from the teacher's own and give vectors of its width without a head.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm.auto import tqdm
from transformers import AutoTokenizer, ElectraConfig, ElectraModel, PreTrainedTokenizerFast

from textcond import ConditioningEncoder, TextEncoder, TextEncoderConfig
from textcond.evaluation import RetrievalTask
from textcond.features import ContrastiveBatch, Features
from textcond.files import half, read_tensors, write_mark, write_tensors
from textcond.folders import atomic_folder, read_json
from textcond.index.image_text import IMAGE_FOLDER, load_image_tower
from textcond.losses import InfoNCE, VectorMSE, WeightedSum
from textcond.pipelines.alignment import AlignmentOptions, align
from textcond.pipelines.loop import fit, share, step_generator
from textcond.training import Data, Mining, Recipe, Stage, train

from . import REFERENCE, load_reference
from .build import build_index
from .data import COLOURS, STYLES, Concept, ReferenceData, caption, is_held_out, is_held_out_concept, read_concepts
from .image_tower import TowerRecipe, train_image_tower
from .phrases import ALIGNED, WITHHELD, build_phrases, digest, foreign_caption, key, read_phrases, reworded, spellings
from .vocabulary import SPECIAL, spelled_characters, train_vocabulary, with_characters

STAGES = ("phrases", "vocabulary", "teacher", "distil", "finetune", "align", "pictures", "ship")
TEACHER_BLOCK = 4096
MOST_ADDED = 80  # words, with which a caption is as long as the student reads


# -- teacher ---------------------------------------------------------------------------------------------------------


def teacher_texts(phrases: Path) -> list[str]:
    """The texts that the teacher reads: every English side once, in the order of `distil.txt`."""
    return list(dict.fromkeys(english for english, _ in read_phrases(phrases / "distil.txt")))


def teacher_vectors(phrases: Path, teacher: str | Path, out: Path, *, kind: str = "query") -> Path:
    """Encode the teacher's texts into `out/vectors.npy`, float16 `(texts, dim)`; goes on where it was stopped.

    Vectors are computed in bfloat16: of multilingual-e5-small they then differ by a cosine of 2e-5, at 2.6 times the
    speed on a CPU that multiplies in it.

    Raises:
        ValueError: `out` was begun with other texts or another teacher.
    """
    texts = teacher_texts(phrases)
    claim = {"texts": len(texts), "digest": digest("\n".join(texts)), "teacher": str(teacher)}
    mark, file = out / "mark.json", out / "vectors.npy"
    done = 0
    if mark.is_file():
        begun = read_json(mark)
        if any(begun[name] != value for name, value in claim.items()):
            raise ValueError(f"{out} holds vectors of other texts or of another teacher: remove it, or choose another")
        done = begun["done"]
        if done == len(texts):
            return file
    encoder = TextEncoder.from_pretrained(teacher, dtype=torch.bfloat16)
    if torch.cuda.is_available():
        encoder.to("cuda")
    out.mkdir(parents=True, exist_ok=True)
    if not mark.is_file():
        np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=(len(texts), encoder.dim)).flush()
        write_mark(mark, claim | {"done": 0})
    vectors = np.lib.format.open_memmap(file, mode="r+")
    with tqdm(total=len(texts), initial=done, desc="teacher", unit="text", mininterval=5) as bar:
        while done < len(texts):
            block = texts[done : done + TEACHER_BLOCK]
            vectors[done : done + len(block)] = encoder.encode(block, kind=kind)
            vectors.flush()
            done += len(block)
            write_mark(mark, claim | {"done": done})
            bar.update(len(block))
    return file


# -- student ---------------------------------------------------------------------------------------------------------


@dataclass
class StudentRecipe:
    """Sizes of the student. Of the teacher it takes the width, the heads and the layers `layers`, counted from 0.

    Before any training a student of the two first and the two last layers found the teacher's vector among 384 for 33%
    of the texts, one of layers 0, 3, 7 and 11 for 6%.
    """

    layers: tuple[int, ...] = (0, 1, 10, 11)
    embedding: int = 128
    max_length: int = 128


def student_config(recipe: StudentRecipe, vocabulary: int, width: int, heads: int, feed_forward: int) -> ElectraConfig:
    """The student's backbone, for a vocabulary with `SPECIAL` first."""
    return ElectraConfig(
        vocab_size=vocabulary,
        embedding_size=recipe.embedding,
        hidden_size=width,
        num_hidden_layers=len(recipe.layers),
        num_attention_heads=heads,
        intermediate_size=feed_forward,
        max_position_embeddings=recipe.max_length,
        type_vocab_size=1,
        bos_token_id=SPECIAL.index("<s>"),
        pad_token_id=SPECIAL.index("<pad>"),
        eos_token_id=SPECIAL.index("</s>"),
    )


@torch.no_grad()
def new_student(tokenizer: PreTrainedTokenizerFast, teacher: TextEncoder, recipe: StudentRecipe) -> TextEncoder:
    """A student with the teacher's layers, and the principal components of the teacher's token embeddings.

    A piece that the teacher's vocabulary has too starts from its embedding there, another one from the mean over how
    the teacher spells it, as in WECHSEL and its kin (Minixhofer et al., 2022).

    Raises:
        ValueError: a layer that the teacher has not, or embeddings that are not narrower than its layers.
    """
    source = teacher.backbone
    if max(recipe.layers) >= source.config.num_hidden_layers:
        raise ValueError(f"layers {recipe.layers}: the teacher has {source.config.num_hidden_layers}, counted from 0")
    own = source.config
    if recipe.embedding >= own.hidden_size:
        raise ValueError(f"embeddings {recipe.embedding} wide, layers {own.hidden_size}: give fewer than that")
    config = student_config(recipe, len(tokenizer), own.hidden_size, own.num_attention_heads, own.intermediate_size)
    backbone = ElectraModel(config)
    for layer, taken in zip(backbone.encoder.layer, recipe.layers):
        layer.load_state_dict(source.encoder.layer[taken].state_dict())
    embeddings = source.embeddings
    words = _piece_embeddings(tokenizer, teacher)
    # The teacher reads a prompt before the text, the student none.
    prompt = len(teacher.tokenize([""], kind="query")["input_ids"][0]) - teacher.tokenizer.num_special_tokens_to_add()
    places = torch.arange(recipe.max_length)
    places = torch.where(places > 0, places + prompt, 0).clamp(max=own.max_position_embeddings - 1)
    positions = embeddings.position_embeddings.weight[places] + embeddings.token_type_embeddings.weight[0]
    usual = positions[1:9].mean(0)
    target = embeddings.LayerNorm(words + usual)
    mean = target.mean(0)
    _, _, components = torch.linalg.svd(target - mean, full_matrices=False)
    components = components[: recipe.embedding].T
    table = (target - mean) @ components
    scale = table.std()
    sample = words[:: max(1, len(words) // 512)]
    shift = torch.stack([embeddings.LayerNorm(sample + place).mean(0) for place in positions])
    shift = (shift - embeddings.LayerNorm(sample + usual).mean(0)) @ components
    new = backbone.embeddings
    new.word_embeddings.weight.copy_(table / scale)
    new.position_embeddings.weight.copy_(shift / scale)
    new.token_type_embeddings.weight.zero_()
    # What the layer norm makes of a row, mapped back to what the teacher's first layer reads.
    normed = torch.cat([new.LayerNorm(new.word_embeddings.weight), torch.ones(len(words), 1)], 1)
    solved = torch.linalg.lstsq(normed, target).solution
    backbone.embeddings_project.weight.copy_(solved[:-1].T)
    backbone.embeddings_project.bias.copy_(solved[-1])
    return TextEncoder(backbone.eval(), tokenizer, TextEncoderConfig(max_length=recipe.max_length))


def _piece_embeddings(tokenizer: PreTrainedTokenizerFast, teacher: TextEncoder) -> Tensor:
    """The teacher's embedding of each piece of the vocabulary, `(pieces, width)`."""
    known = teacher.tokenizer.get_vocab()
    weight = teacher.backbone.embeddings.word_embeddings.weight
    average = weight.mean(0)
    rows = []
    for piece in tokenizer.convert_ids_to_tokens(range(len(tokenizer))):
        if piece in known:
            rows.append(weight[known[piece]])
            continue
        spelled = teacher.tokenizer(piece.replace("▁", " "), add_special_tokens=False)["input_ids"]
        rows.append(weight[spelled].mean(0) if spelled else average)
    return torch.stack(rows)


# -- distillation ----------------------------------------------------------------------------------------------------


@dataclass
class DistilRecipe:
    """Options of the stage. Of a line with two texts the student reads the other language's with probability `other`.

    A share `words` of the steps reads `words.txt` alone: how often a word is read decides, and short texts are quick.
    `bank` vectors of other texts are negatives in each step: the teacher has read them already. The squared error is
    summed over dimensions, twice one minus the cosine, and weighs `vector_weight`.
    """

    steps: int = 2400
    batch: int = 384
    bank: int = 2048
    other: float = 0.7
    words: float = 0.5
    temperature: float = 0.05
    vector_weight: float = 1.0
    learning_rate: float = 1e-3
    adam_rate: float = 1e-3
    seed: int = 0


class Student(nn.Module):
    """The training view of an encoder: texts in, vectors with their graph out."""

    def __init__(self, encoder: TextEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors `(texts, dim)`."""
        return self.encoder.features(texts).dense


class DistilBatches:
    """Lines of `distil.txt`, with the teacher's vectors of their English sides, the mean of all taken away.

    The teacher's cosines lie between 0.7 and 1, for all vectors share a direction that tells nothing; without it, and
    of unit length again, they use the whole range. A student's own vectors have none such: `centred` leaves them.
    """

    def __init__(self, phrases: Path, vectors: Path, recipe: DistilRecipe, *, centred: bool = False):
        self.recipe = recipe
        self.vectors = np.load(vectors, mmap_mode="r")
        mean = 0 if centred else self.vectors.mean(0, dtype=np.float64)
        self.mean = np.broadcast_to(mean, self.vectors.shape[1]).astype(np.float32)
        rows: dict[str, int] = {}
        self.lines, self.words = (
            [(rows.setdefault(english, len(rows)), english, other) for english, other in read_phrases(phrases / name)]
            for name in ("distil.txt", "words.txt")
        )
        if recipe.words and not self.words:
            raise ValueError(f"{phrases / 'words.txt'} is empty: set words=0, or run stage phrases with more sources")
        if len(rows) != len(self.vectors):
            raise ValueError(
                f"{vectors} holds {len(self.vectors)} vectors, {phrases} {len(rows)} texts: run stage teacher again"
            )

    def draw(self, step: int) -> tuple[list[str], list[int], list[int]]:
        """Texts of a step, the teacher's row of each, and the rows of the bank."""
        generator = step_generator(self.recipe.seed, step)
        short = torch.rand(1, generator=generator).item() < self.recipe.words
        source = self.words if short else self.lines
        picks = torch.randint(len(source), (self.recipe.batch,), generator=generator).tolist()
        translated = (torch.rand(self.recipe.batch, generator=generator) < self.recipe.other).tolist()
        bank = torch.randint(len(self.vectors), (self.recipe.bank,), generator=generator).tolist()
        lines = [source[pick] for pick in picks]
        texts = [other if other and use else english for (_, english, other), use in zip(lines, translated)]
        return texts, [row for row, _, _ in lines], bank

    def contrast(self, vectors: Tensor, rows: list[int], bank: list[int]) -> ContrastiveBatch:
        """What the losses see: the student's vectors are queries, the teacher's are documents."""
        keys = torch.tensor(rows + bank, device=vectors.device) + 1
        teacher = torch.from_numpy(self.vectors[rows + bank] - self.mean).to(vectors.device)
        teacher = nn.functional.normalize(teacher, dim=-1)
        count = len(rows)
        return ContrastiveBatch(
            queries=Features(vectors),
            documents=Features(teacher),
            positives=torch.arange(count, device=vectors.device),
            owners=torch.arange(len(keys), device=vectors.device) % count,
            query_keys=keys[:count],
            document_keys=keys,
            known_positives=keys[:count, None],
            teacher_queries=teacher[:count],
        )


def distil(
    student: TextEncoder, batches: DistilBatches, out: Path, recipe: DistilRecipe, accelerator: Accelerator
) -> None:
    """Draw the student's vectors of both languages to the teacher's of the English side.

    Mean squared error (Reimers and Gurevych, 2020) places a vector, InfoNCE against the teacher's vectors of other
    texts tells it from its neighbours.
    """
    module = Student(student)
    losses = WeightedSum(
        [(recipe.vector_weight * student.dim, VectorMSE(["queries"])), (1.0, InfoNCE(recipe.temperature))],
    )
    mine = share(accelerator, recipe.batch)

    def loss(prepared: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
        texts, rows, bank = batches.draw(step)
        batch = batches.contrast(prepared(texts[mine]).float(), rows[mine], bank)
        with torch.no_grad():
            cosine = (batch.queries.dense * batch.teacher_queries).sum(1).mean().item()
            hits = (batch.queries.dense @ batch.documents.dense.T).masked_fill(batch.false_negatives(), -1).argmax(1)
        return losses(batch), {"cosine": cosine, "accuracy": (hits == batch.positives).float().mean().item()}

    weights = fit(
        "distil",
        module,
        loss,
        out=out,
        steps=recipe.steps,
        batch=recipe.batch,
        warmup=min(100, recipe.steps // 10),
        decay=0.4,
        learning_rate=recipe.learning_rate,
        adam_rate=recipe.adam_rate,
        bf16=True,
        dropout=False,
        accelerator=accelerator,
    )
    module.load_state_dict(weights)
    student.eval()


# -- more characters -------------------------------------------------------------------------------------------------


class _Grown(nn.Module):
    """A table of embeddings of which the last rows alone are trained."""

    def __init__(self, table: Tensor):
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, rows: Tensor) -> Tensor:
        return torch.cat([self.table, rows])


def add_characters(
    start: Path, phrases: Path, teacher: str | Path, out: Path, recipe: MultilingualRecipe, accelerator: Accelerator
) -> None:
    """Give an encoder pieces for the commonest characters that it spells in bytes, and save it as `out/encoder`.

    A new embedding starts from the teacher's, by the linear map that fits the pieces that both vocabularies have. Then
    the new ones alone are trained: what is said with them is to get the vector that the encoder itself has of the
    English side. All texts without them are read as before. An encoder of more than `recipe.vocabulary` pieces has been
    given its own, and nothing is saved.
    """
    encoder = ConditioningEncoder.from_pretrained(start, dtype=torch.float32)
    old = encoder.tokenizer
    added = spelled_characters(phrases, old, recipe.characters) if len(old) <= recipe.vocabulary else []
    if not added:
        return
    encoder.tokenizer = with_characters(old, added)
    table = encoder.backbone.get_input_embeddings().weight.detach()
    read = TextEncoder.from_pretrained(teacher)
    with torch.no_grad():
        pieces = _piece_embeddings(encoder.tokenizer, read)
    known = read.tokenizer.get_vocab()
    shared = [place for piece, place in old.get_vocab().items() if piece in known]
    pieces = torch.cat([pieces, torch.ones(len(pieces), 1)], 1)
    rows = pieces[len(old) :] @ torch.linalg.lstsq(pieces[shared], table[shared]).solution
    work, normalizer = out / "characters", old.backend_tokenizer.normalizer
    with accelerator.main_process_first():
        if not (work / "distil.txt").is_file():
            with atomic_folder(work, owned=("*.txt",)) as folder:
                (folder / "words.txt").touch()
                with (folder / "distil.txt").open("w", encoding="utf-8") as file:
                    for english, other in read_phrases(phrases / "distil.txt"):
                        if other and set(added).intersection(normalizer.normalize_str(other)):
                            file.write(f"{english}\t{other}\n")
        vectors = teacher_vectors(work, start, work / "vectors")
    encoder.backbone.resize_token_embeddings(len(encoder.tokenizer), mean_resizing=False)
    encoder.backbone.requires_grad_(False)
    embeddings = encoder.backbone.get_input_embeddings()
    parametrize.register_parametrization(embeddings, "weight", _Grown(table), unsafe=True)
    embeddings.parametrizations.weight.original = nn.Parameter(rows)
    options = replace(recipe.distil, steps=recipe.character_steps, other=1.0, words=0.0, adam_rate=1e-2)
    distil(encoder.text_encoder, DistilBatches(work, vectors, options, centred=True), work, options, accelerator)
    parametrize.remove_parametrizations(embeddings, "weight")
    if accelerator.is_main_process:
        encoder.save_pretrained(out / "encoder")
    accelerator.wait_for_everyone()


# -- fine-tuning -----------------------------------------------------------------------------------------------------


@dataclass
class FinetuneRecipe:
    """Options of the stage: how many of the pairs are read, and the training."""

    pairs: int = 40_000
    steps: int = 200
    batch: int = 128
    negatives: int = 2
    learning_rate: float = 1e-4
    temperature: float = 0.03
    seed: int = 0


def finetune(encoder: Path, phrases: Path, out: Path, recipe: FinetuneRecipe) -> Path:
    """Contrastive fine-tuning on translations, definitions and descriptions with mined negatives; `out/encoder`.

    Negatives are what the distilled encoder itself takes for right, save what it scores nearly as high as the positive:
    names have synonyms.
    """
    data = out / "pairs"
    if not data.is_dir():
        with (phrases / "pairs.jsonl").open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in itertools.islice(file, recipe.pairs)]
        with atomic_folder(data, owned=("*",)) as folder:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
            positives = dict.fromkeys(row["pos"][0] for row in rows)
            corpus = [
                json.dumps({"_id": f"d{number}", "title": "", "text": text}, ensure_ascii=False) + "\n"
                for number, text in enumerate(positives)
            ]
            (folder / "corpus.jsonl").write_text("".join(corpus), encoding="utf-8")
    mining = Mining(
        corpus=str(data / "corpus.jsonl"),
        sources={"dense": 0.75, "bm25": 0.25},
        options={"num_negatives": 4, "range_max": 40, "sampling": "random", "relative": 0.95, "on_short": "keep"},
    )
    stage = Stage(
        data=[Data(str(data / "train.jsonl"))],
        steps=recipe.steps,
        name="finetune",
        mining=mining,
        loss={
            "name": "infonce",
            "temperature": recipe.temperature,
            "directions": ["query_to_document", "document_to_query"],
        },
        batch_size=recipe.batch,
        negatives=recipe.negatives,
        learning_rate=recipe.learning_rate,
    )
    return train(Recipe(model=str(encoder), stages=[stage], mixed_precision="bf16", seed=recipe.seed), out)


# -- alignment -------------------------------------------------------------------------------------------------------


@dataclass
class AlignRecipe:
    """What the alignment reads, and how it is trained.

    Three lines in four are captions of what the denoiser can draw, for it is the times that a word is seen which limit
    an alignment; the rest keeps the encoder from drawing those pictures for any other text.

    Attributes:
        concepts: how many of the reference data's concepts the denoiser was taught.
        translations: of each caption, in the languages with captions drawn anew.
        names: of each caption's concept, in further languages drawn anew; the rest of the caption stays English.
        alone: times that each name stands by itself, in each language with captions; Japanese ones in hiragana too.
        modified: of each caption, half of them reworded, among modifiers that the teacher does not read: its own
            encoder takes them for what is to be drawn, and loses the caption if they come first or are many.
        reworded: of each caption, in other words or another order, see `REWORDED`, and of Japanese ones half in
            hiragana; the teacher reads the caption, since its encoder was taught no other form.
        words: captions of each translation that `words.txt` has of a name or keyword of what is drawn, beside the word
            alone; the teacher reads the English word. A name is one word of several, and among the general lines a
            dictionary's is hardly ever read. None with `leave_out`, for they come in its languages too.
        favoured: how many times as often as the others a language is drawn, for those that are to catch up.
        leave_out: the languages `WITHHELD` and the concepts that the cases "dictionary" and "unseen" ask for; False for
            an encoder that is to draw all that the denoiser can, in any of its languages, of which these cases then
            tell nothing.
        general: share of lines from `prompts.tsv`.
        anchors: lines of `distil.txt` whose vectors are to stay.
    """

    concepts: int = 300
    translations: int = 3
    names: int = 1
    alone: int = 2
    modified: int = 3
    reworded: int = 3
    words: int = 2
    favoured: dict[str, float] = field(default_factory=dict)
    leave_out: bool = False
    general: float = 0.25
    anchors: int = 300_000
    seed: int = 0
    options: AlignmentOptions = field(
        default_factory=lambda: AlignmentOptions(
            token_steps=6000,
            denoiser_steps=0,
            layers="average",
            train_backbone=True,
            retrieval_weight=2.0,
            validate_every=500,
            learning_rate=2e-3,
            held_out=128,
            mixed_precision="bf16",
        )
    )


def alignment_prompts(phrases: Path, concepts: Sequence[Concept], recipe: AlignRecipe) -> list[str]:
    """Lines of `english TAB other`: captions of what the denoiser knows in the aligned languages, and other phrases.

    Held-out combinations of style and colour have no caption, nor with `leave_out` have held-out concepts.
    """
    captioned = ALIGNED if recipe.leave_out else (*ALIGNED, *WITHHELD)
    rng = np.random.default_rng(recipe.seed)
    drawn = concepts[: recipe.concepts]
    modifiers = (phrases / "modifiers.txt").read_text(encoding="utf-8").splitlines()
    left_out = [concept for concept in drawn if recipe.leave_out and is_held_out_concept(concept.name)]
    hidden = {key(name) for concept in left_out for name in concept.names.values()}
    lines: list[str] = []

    def odds(languages: list[str]) -> np.ndarray:
        times = np.array([recipe.favoured.get(language, 1.0) for language in languages])
        return times / times.sum()

    for concept in drawn:
        if concept in left_out:
            continue
        names = {language: name for language, name in concept.names.items() if key(name) not in hidden}
        aligned = sorted(language for language in names if language in captioned)
        further = sorted(language for language in names if language.split("-")[0] not in ("en", *ALIGNED, *WITHHELD))
        said_in = ["en", *aligned]
        for language in aligned:
            lines += [f"{concept.name}\t{name}" for name in spellings(names[language], language)] * recipe.alone
        parts = itertools.product([None, *STYLES], [None, *COLOURS])
        for style, colour in parts:
            if style and colour and is_held_out(concept.name, style, colour):
                continue
            english = caption(concept, style, colour)
            lines.append(english)
            for language in rng.choice(aligned, min(recipe.translations, len(aligned)), replace=False, p=odds(aligned)):
                lines.append(f"{english}\t{foreign_caption(names[language], language, style, colour)}")
            for language in rng.permutation(further)[: recipe.names]:
                lines.append(f"{english}\t{caption(concept, style, colour, words=names[language])}")
            added = recipe.modified if modifiers else 0
            for place, language in enumerate(rng.choice(said_in, added + recipe.reworded, p=odds(said_in))):
                if place >= added or rng.random() < 0.5:
                    name = str(rng.choice(spellings(concept.name if language == "en" else names[language], language)))
                    said = reworded(name, language, style, colour, rng)
                else:
                    said = english if language == "en" else foreign_caption(names[language], language, style, colour)
                lines.append(f"{english}\t{modified(said, modifiers, rng) if place < added else said}")
        if len(concept.keywords) > 1:
            for style in STYLES:
                words = ", ".join(rng.permutation(concept.keywords)[: int(rng.integers(1, 4))])
                lines.append(caption(concept, style, words=words))
    said_of: dict[str, list[str]] = {}
    for concept in drawn:
        for word in (concept.name, *concept.keywords):
            said_of.setdefault(key(word), []).append(concept.name)
    for english, other in read_phrases(phrases / "words.txt") if recipe.words and not recipe.leave_out else ():
        if other is None or (names := said_of.get(key(english))) is None:
            continue
        lines.append(f"{english}\t{other}")
        for _ in range(recipe.words):
            style, colour = str(rng.choice(list(STYLES))), str(rng.choice(list(COLOURS)))
            parts = ((style, None), (None, colour), (style, colour))[rng.integers(3)]
            if all(parts) and any(is_held_out(name, style, colour) for name in names):
                parts = (style, None)
            lines.append("\t".join(caption(drawn[0], *parts, words=word) for word in (english, other)))
    others = (phrases / "prompts.tsv").read_text(encoding="utf-8").splitlines()
    count = min(len(others), round(len(lines) * recipe.general / (1 - recipe.general)))
    lines += [others[place] for place in rng.permutation(len(others))[:count]]
    return [lines[place] for place in rng.permutation(len(lines))]


def held_out_captions(lines: Sequence[str], concepts: Sequence[Concept], count: int) -> list[str]:
    """All lines of the first `count` captions among them, to score an alignment by: the other phrases are more.

    Their English is no line that the alignment reads, see `align`.
    """
    parts = list(itertools.product([None, *STYLES], [None, *COLOURS]))
    captions = {caption(concept, style, colour) for concept in concepts for style, colour in parts}
    said = dict.fromkeys(line.partition("\t")[0] for line in lines)
    chosen = set(itertools.islice((english for english in said if english in captions), count))
    return [line for line in lines if line.partition("\t")[0] in chosen]


def modified(text: str, modifiers: Sequence[str], rng: np.random.Generator) -> str:
    """A text with up to `MOST_ADDED` words of modifiers before and after it, mostly few."""
    missing, added = math.exp(rng.uniform(0, math.log(MOST_ADDED))), []
    while missing > 0:
        added.append(modifiers[rng.integers(len(modifiers))])
        missing -= len(added[-1].split())
    place = rng.integers(len(added) + 1)
    return ", ".join([*added[:place], text, *added[place:]])


# -- the whole -------------------------------------------------------------------------------------------------------


@dataclass
class MultilingualRecipe:
    """The options of every stage.

    Attributes:
        vocabulary: pieces that are learned.
        characters: that become pieces beyond those.
        character_steps: in which an encoder that goes on learns its new ones.
    """

    vocabulary: int = 20_000
    characters: int = 4_000
    character_steps: int = 400
    student: StudentRecipe = field(default_factory=StudentRecipe)
    distil: DistilRecipe = field(default_factory=DistilRecipe)
    finetune: FinetuneRecipe = field(default_factory=FinetuneRecipe)
    align: AlignRecipe = field(default_factory=AlignRecipe)
    pictures: TowerRecipe = field(default_factory=TowerRecipe)


def build_multilingual(
    out: str | Path,
    stages: Sequence[str] = STAGES,
    *,
    phrases: str | Path,
    teacher: str | Path = "intfloat/multilingual-e5-small",
    packages: str | Path | None = None,
    data: str | Path | None = None,
    start: str | Path | None = None,
    pipeline: DiffusionPipeline | None = None,
    recipe: MultilingualRecipe | None = None,
) -> Path:
    """Run `stages` in order under `out`; what a stage has finished is kept, what it has begun is resumed.

    Args:
        out: the working folder; `out/encoder` is what ships.
        stages: names of `STAGES`.
        phrases: the folder of `build_phrases`; stage "phrases" makes it.
        teacher: a BERT-like text encoder.
        packages: for stage "phrases", see `build_phrases`.
        data: for stages "phrases", "align", "pictures" and "ship", the reference data.
        start: an encoder that an earlier run shipped, to train on: its vocabulary, layers, bridge and image tower are
            kept, and it can be aligned without the stages before; "vocabulary" gives it more characters, see
            `add_characters`. None starts from the teacher's layers and a new bridge.
        pipeline: for stage "align", what the encoder is to condition; None for the reference model.
        recipe: the options.

    Raises:
        ValueError: an unknown stage, stage "phrases" without `packages` and `data`, or stage "align" without `data`.
        FileNotFoundError: a stage whose input no earlier stage has made.
    """
    out, phrases, recipe = Path(out), Path(phrases), recipe or MultilingualRecipe()
    for stage in stages:
        if stage not in STAGES:
            raise ValueError(f"there is no stage {stage!r}: choose from {', '.join(STAGES)}")
    if data is None and (reading := {"phrases", "align", "pictures", "ship"}.intersection(stages)):
        raise ValueError(f"stage {min(reading)} reads the reference data: pass data=")
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    vocabulary, vectors, distilled = out / "vocabulary", out / "teacher", out / "distil"
    tower_before = Path(start or REFERENCE / "text_encoder")
    with accelerator.main_process_first():
        if "phrases" in stages and not (phrases / "words.txt").is_file():  # which older folders have not
            if packages is None:
                raise ValueError("stage phrases reads packages: pass packages=")
            build_phrases(phrases, packages=packages, data=data)
        if "vocabulary" in stages:
            _need(phrases / "distil.txt", "phrases")
        if "vocabulary" in stages and start is None and not vocabulary.is_dir():
            train_vocabulary(
                phrases, vocabulary, recipe.vocabulary, characters=recipe.characters,
                max_length=recipe.student.max_length,
            )  # fmt: skip
        if "teacher" in stages:
            _need(phrases / "distil.txt", "phrases")
            teacher_vectors(phrases, teacher, vectors)
    if "vocabulary" in stages and start is not None and not (vocabulary / "encoder").is_dir():
        add_characters(Path(start), phrases, teacher, vocabulary, recipe, accelerator)
    if (vocabulary / "encoder").is_dir():
        start = vocabulary / "encoder"
    if "distil" in stages and not (distilled / "encoder").is_dir():
        if start is None:
            _need(vocabulary, "vocabulary")
        _need(vectors / "vectors.npy", "teacher")
        mark = read_json(vectors / "mark.json")
        if mark["done"] < mark["texts"]:
            raise FileNotFoundError(f"{vectors} holds {mark['done']} of {mark['texts']} vectors: finish stage teacher")
        torch.manual_seed(recipe.distil.seed)
        if start is None:
            tokenizer = AutoTokenizer.from_pretrained(vocabulary)
            student = new_student(tokenizer, TextEncoder.from_pretrained(teacher), recipe.student)
        else:
            student = TextEncoder.from_pretrained(start, dtype=torch.float32)
        batches = DistilBatches(phrases, vectors / "vectors.npy", recipe.distil)
        distil(student, batches, distilled, recipe.distil, accelerator)
        if accelerator.is_main_process:
            student.save_pretrained(distilled / "encoder")
        accelerator.wait_for_everyone()
    if "finetune" in stages and not (out / "finetune" / "encoder").is_dir():
        _need(distilled / "encoder", "distil")
        finetune(distilled / "encoder", phrases, out / "finetune", recipe.finetune)
    if "align" in stages and not (out / "aligned" / "alignment.json").is_file():
        tuned = out / "finetune" / "encoder"
        if start is None:
            _need(tuned, "finetune")
        concepts = read_concepts(data)
        lines = alignment_prompts(phrases, concepts, recipe.align)
        held_out = held_out_captions(lines, concepts[: recipe.align.concepts], recipe.align.options.held_out)
        if start is None:
            encoder = TextEncoder.from_pretrained(tuned)
        else:
            encoder = ConditioningEncoder.from_pretrained(start, dtype=torch.float32)
            if tuned.is_dir():
                encoder.backbone.load_state_dict(TextEncoder.from_pretrained(tuned).backbone.state_dict())
        with (phrases / "distil.txt").open(encoding="utf-8") as file:
            anchors = list(itertools.islice(file, recipe.align.anchors))
        align(
            pipeline or load_reference(), encoder, lines, out / "aligned", recipe.align.options,
            held_out=held_out, anchors=anchors,
        )  # fmt: skip
    if "pictures" in stages and not (out / "pictures" / IMAGE_FOLDER).is_dir():
        _need(out / "aligned" / "alignment.json", "align")
        drawings, encoder = ReferenceData.load(data), TextEncoder.from_pretrained(out / "aligned")
        tower = load_image_tower(tower_before)
        tower = train_image_tower(
            encoder, tower, drawings, out / "pictures", indexed(drawings), recipe.pictures, accelerator
        )
        if accelerator.is_main_process:
            tower.save_pretrained(out / "pictures" / IMAGE_FOLDER)
        accelerator.wait_for_everyone()
    if "ship" in stages and accelerator.is_main_process:
        _need(out / "aligned" / "alignment.json", "align")
        _need(out / "pictures" / IMAGE_FOLDER, "pictures")
        ship(out / "aligned", out / "pictures" / IMAGE_FOLDER, out / "encoder")
        drawings = ReferenceData.load(data)
        encoder = TextEncoder.from_pretrained(out / "encoder")
        build_index(drawings, encoder, out / "encoder" / "index", recipe.align.concepts, indexed(drawings))
    return out


def indexed(data: ReferenceData) -> list[str]:
    """Languages of the shipped index: English, those of the alignment, and some that it leaves out."""
    named = {"en"}.union(*(concept.names for concept in data.concepts))
    return [language for language in ("en", *ALIGNED, *WITHHELD) if language in named]


def ship(aligned: Path, tower: Path, out: Path) -> None:
    """Copy an aligned encoder to `out`, and an image tower into it, their weights in float16."""
    with atomic_folder(out, owned=("*",)) as folder:
        (folder / IMAGE_FOLDER).mkdir()
        for source, target in ((aligned, folder), (tower, folder / IMAGE_FOLDER)):
            for file in sorted(source.iterdir()):
                if file.suffix == ".safetensors":
                    write_tensors(target / file.name, half(read_tensors(file)))
                elif file.name == "tokenizer.json":  # without its spaces half as large
                    small = json.dumps(read_json(file), ensure_ascii=False, separators=(",", ":"))
                    (target / file.name).write_text(small, encoding="utf-8")
                elif file.is_file() and file.name != "alignment.json":
                    shutil.copy(file, target / file.name)


def _need(path: Path, stage: str) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: run stage {stage} first")


def name_task(phrases: str | Path, languages: Sequence[str]) -> RetrievalTask:
    """Held-out names in some languages as queries, the English names of all characters as documents.

    Raises:
        ValueError: a language of which there is no name.
    """
    corpus: dict[str, str] = {}
    asked: list[tuple[str, str, str]] = []
    with (Path(phrases) / "names.tsv").open(encoding="utf-8") as file:
        for line in file:
            language, name, english = line.rstrip("\n").split("\t")
            if language == "en":
                corpus[f"d{digest(english):016x}"] = english
            if language in languages and is_held_out_concept(english):
                asked.append((language, name, english))
    if missing := set(languages) - {language for language, _, _ in asked}:
        raise ValueError(f"{phrases} holds no held-out name in {sorted(missing)[0]!r}: take a language of CLDR")
    queries = {f"q{number}": name for number, (_, name, _) in enumerate(asked)}
    qrels = {f"q{number}": {f"d{digest(english):016x}": 1} for number, (_, _, english) in enumerate(asked)}
    return RetrievalTask("+".join(languages), queries, corpus, qrels)
