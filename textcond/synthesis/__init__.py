"""Training triples written by a large language model, as in E5-mistral (Wang et al. 2024, arXiv:2401.00368)."""

from textcond.synthesis.backends import Backend, Reply, TryAgain
from textcond.synthesis.chat_endpoint import ChatEndpoint
from textcond.synthesis.local_model import LocalModel
from textcond.synthesis.prompts import KINDS, Task
from textcond.synthesis.synthesize import Summary, synthesize

__all__ = ["KINDS", "Backend", "ChatEndpoint", "LocalModel", "Reply", "Summary", "Task", "TryAgain", "synthesize"]
