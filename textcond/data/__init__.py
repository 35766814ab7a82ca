"""Training data: examples, the files that hold them, and the batches drawn from them."""

from textcond.data.example import Example
from textcond.data.example_file import ExampleFile, as_example_file
from textcond.data.reading import ExampleReader, read_examples
from textcond.data.sampler import BatchSampler
from textcond.data.text_table import TextTable
from textcond.data.writing import write_examples

__all__ = [
    "BatchSampler",
    "Example",
    "ExampleFile",
    "ExampleReader",
    "TextTable",
    "as_example_file",
    "read_examples",
    "write_examples",
]
