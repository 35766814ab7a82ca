"""Negatives for contrastive training: found, scored, filtered and mixed."""

from .corpus import Corpus
from .embeddings import cached_embeddings
from .known import KnownPositives
from .mining import mine
from .mining_file import mine_file
from .options import MiningOptions, MiningReport
from .search import ExactSearch
from .sources import BM25, Dense, Random, RunFile, Source, build_sources
from .teachers import CrossEncoderTeacher, EncoderTeacher

__all__ = [
    "BM25",
    "Corpus",
    "CrossEncoderTeacher",
    "Dense",
    "EncoderTeacher",
    "ExactSearch",
    "KnownPositives",
    "MiningOptions",
    "MiningReport",
    "Random",
    "RunFile",
    "Source",
    "build_sources",
    "cached_embeddings",
    "mine",
    "mine_file",
]
