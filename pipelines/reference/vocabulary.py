"""The vocabulary of the multilingual encoder: pieces of words, and a piece for each of the commoner characters.

A character without a piece is read byte by byte, and hardly learned: without those, 118 of the 300 names of what the
denoiser draws had such a one in Chinese, and 101 in Korean.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast

from textcond.folders import atomic_folder

from .phrases import read_phrases

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # the order of XLM-R
BYTES = tuple(f"<0x{value:02X}>" for value in range(256))


def train_vocabulary(
    phrases: Path,
    out: Path,
    size: int,
    *,
    characters: int = 0,
    max_length: int = 128,
    least: int = 8,
    texts: int = 150_000,
) -> Path:
    """Learn a unigram vocabulary of lower-cased pieces (Kudo, 2018) and save a tokenizer folder.

    It reads the first `texts` texts of other languages than English and a third as many English ones, so that English
    does not take more than its share. Characters that come fewer than `least` times are spelled in bytes, as in Llama,
    save the commonest `characters` of them, which become pieces beyond `size`.

    Raises:
        ValueError: a size that leaves no piece beside the special tokens and the bytes.
    """
    pieces = size - len(SPECIAL) - len(BYTES)
    if pieces < 1:
        raise ValueError(f"a vocabulary of {size} is taken up by {size - pieces} special tokens and bytes: raise it")
    normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    read = [normalizer.normalize_str(text) for text in _vocabulary_texts(phrases, texts)]
    count = Counter(itertools.chain.from_iterable(read))
    rare = {character: " " for character, times in count.items() if times < least}
    table = str.maketrans(rare)
    learner = Tokenizer(Unigram())
    # Without spaces between words, the commas of captions would else be inside of pieces.
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"), pre_tokenizers.Punctuation()]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=pieces, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    learner.train_from_iterator((text.translate(table) for text in read), trainer)
    learned = [(piece, score) for piece, score in json.loads(learner.to_str())["model"]["vocab"] if piece != "<unk>"]
    worst = min(score for _, score in learned)
    vocabulary = [(token, 0.0) for token in SPECIAL] + learned + [(piece, worst - 10.0) for piece in BYTES]
    backend = Tokenizer(Unigram(vocabulary, unk_id=SPECIAL.index("<unk>"), byte_fallback=True))
    backend.normalizer, backend.pre_tokenizer = normalizer, learner.pre_tokenizer
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[(token, SPECIAL.index(token)) for token in ("<s>", "</s>")],
    )
    tokenizer = _tokenizer(backend, max_length)
    tokenizer = with_characters(tokenizer, spelled_characters(phrases, tokenizer, characters))
    with atomic_folder(out, owned=("*",)) as folder:
        tokenizer.save_pretrained(folder)
    return out


def spelled_characters(phrases: Path, tokenizer: PreTrainedTokenizerFast, most: int) -> list[str]:
    """The commonest characters of `distil.txt` that the tokenizer spells in bytes, `most` of them at the most."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    count: Counter[str] = Counter()
    for english, other in read_phrases(phrases / "distil.txt"):
        count.update(normalizer.normalize_str(other or english))
    known = tokenizer.get_vocab()
    spelled = [character for character in count if character != " " and character not in known]
    return sorted(spelled, key=lambda character: (-count[character], character))[:most]


def with_characters(tokenizer: PreTrainedTokenizerFast, characters: Sequence[str]) -> PreTrainedTokenizerFast:
    """The same tokenizer with some characters as pieces, numbered after its own: it reads all other texts as before."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    worst = min(score for piece, score in vocabulary if piece not in BYTES)
    vocabulary += [(character, worst) for character in characters]
    return _tokenizer(Tokenizer.from_str(json.dumps(content)), tokenizer.model_max_length)


def _tokenizer(backend: Tokenizer, max_length: int) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=max_length,
    )


def _vocabulary_texts(phrases: Path, texts: int) -> Iterator[str]:
    """The English third, then the others: each side of the file is read in its order."""
    lines = list(read_phrases(phrases / "distil.txt"))
    yield from itertools.islice((english for english, _ in lines), texts // 3)
    yield from itertools.islice((other for _, other in lines if other is not None), texts)
