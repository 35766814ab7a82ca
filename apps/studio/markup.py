"""The small pieces of HTML between the components."""

from __future__ import annotations

import html

from textcond.apps.generation import PromptLength
from textcond.apps.metadata import Parameters

from .drawing import Step, Waiting

HEAD = """<div id="head"><h1>text<i>cond</i> studio</h1>
<p>One encoder conditions the picture and finds the prompts beside it.</p>
<button type="button" id="shade" title="Light or dark" aria-label="Light or dark">◐</button></div>"""


def heading(title: str, told: str = "", *, alas: bool = False) -> str:
    """A title with a line below it."""
    return f'<h2>{html.escape(title)}</h2><p class="{"alas" if alas else "quiet"}">{html.escape(told) or "&nbsp;"}</p>'


def plain(told: str) -> str:
    """A line of text, which may hold anything."""
    return f'<span role="status">{html.escape(told)}</span>'


def loaded(pipeline: str, place: str) -> str:
    """Which pipeline draws, and where."""
    return f'<p class="quiet">{html.escape(" · ".join(filter(None, (pipeline, place))))}</p>'


def alas(told: str) -> str:
    """Something that went wrong."""
    return f'<span class="alas" role="alert">{html.escape(told)}</span>'


def length(read: PromptLength) -> str:
    """How many tokens, and where the encoder stops reading."""
    if read.truncated:
        kept = html.escape(read.kept[-40:])
        return (
            f'<span class="cut">{read.tokens:,} of {read.limit:,} tokens: the encoder stops reading after '
            f"“…<bdi>{kept}</bdi>”</span>"
        )
    return f"{read.tokens:,} of {read.limit:,} tokens"


def bar(done: float, told: str) -> str:
    """A progress bar with what is done now."""
    percent = round(100 * done)
    return (
        f'<div class="bar" role="progressbar" aria-valuenow="{percent}" aria-valuemin="0" aria-valuemax="100">'
        f'<div style="width:{percent}%"></div></div><span role="status">{html.escape(told)}</span>'
    )


def progress(event: Waiting | Step, what: str = "") -> str:
    """How far a drawing is, or how many are served before it."""
    if isinstance(event, Waiting):
        people = "1 person is" if event.ahead == 1 else f"{event.ahead} people are"
        return bar(0, f"{people} before you: about {seconds(event.seconds)}")
    left = f" · {seconds(event.seconds)} left" if event.seconds >= 1.5 else ""
    return bar(event.done / event.total, f"{what}Step {event.done} of {event.total}{left}")


def seconds(number: float) -> str:
    """A duration as people say it."""
    return f"{number / 60:.0f} min" if number >= 90 else f"{max(1, round(number))} s"


def used(parameters: Parameters) -> str:
    """The neighbours that a picture is made with, and the prompt that became of them; empty without retrieval."""
    if not parameters.retrieval:
        return ""
    neighbours = parameters.retrieval.get("neighbours")
    if not neighbours:
        return '<p class="quiet">The index holds no neighbours.</p>'
    rows = "".join(f"<li>{score:.2f} · <bdi>{html.escape(text)}</bdi></li>" for text, score in neighbours)
    told = "By meaning and words together; the number is the cosine of the meanings."
    became = ""
    if parameters.retrieval.get("mode") == "expand":
        same = parameters.retrieval.get("prompt") == parameters.prompt
        prompt = html.escape(parameters.prompt)
        became = "<p>They add nothing to it.</p>" if same else f"<p>The prompt became “<bdi>{prompt}</bdi>”.</p>"
    return f'<ul>{rows}</ul><p class="quiet">{told}</p>{became}'


def made(parameters: Parameters, took: float | None = None) -> str:
    """What made a picture, in one line."""
    parts = [
        f"seed {parameters.seed}",
        f"{parameters.num_inference_steps} steps",
        f"guidance {parameters.guidance_scale:g}",
        f"{parameters.width}×{parameters.height}",
        *([f"{took:.1f} s"] if took is not None else []),
    ]
    return f'<span role="status">{" · ".join(parts)}</span>'
