"""Training triples written by a language model: brainstorm tasks, then write a triple of varied attributes for each."""

from __future__ import annotations

import itertools
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from textcond.data import Example, write_examples
from textcond.duplicates import DistinctTexts, without_punctuation
from textcond.folders import write_json
from textcond.synthesis.backends import Backend, Reply
from textcond.synthesis.journal import Journal
from textcond.synthesis.prompts import KINDS, TASKS_A_REPLY, Task, tasks_prompt, triple_prompt, wording
from textcond.synthesis.requests import Request, Requests
from textcond.synthesis.validation import Unusable, check_tasks, check_triple

# this many useless replies in a row say that more money would be wasted
USELESS_IN_A_ROW = 50

logger = logging.getLogger(__name__)


@dataclass
class Summary:
    """What a synthesis gave and cost, over all its runs; written beside the triples as `<name>.summary.json`.

    - `stopped`: the bound that ended it early, None if it is whole.
    - `rejected`: unusable replies and duplicates, by reason.
    - `tokens`: tokens read and written, as the backend counts them.
    """

    model: str
    tasks: int = 0
    triples: int = 0
    wanted: int = 0
    stopped: str | None = None
    requests: int = 0
    failed_requests: int = 0
    tokens: int = 0
    rejected: dict[str, int] = field(default_factory=dict)


def synthesize(
    backend: Backend,
    out: str | Path,
    *,
    tasks: int | Sequence[Task] = 100,
    triples: int = 1000,
    languages: Sequence[str] | Mapping[str, float] = ("English",),
    kinds: Sequence[str] = tuple(KINDS),
    max_requests: int | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
    concurrency: int = 8,
) -> Path:
    """Write (query, positive, hard negative) triples with a language model, as in E5-mistral (Wang et al. 2024).

    Every request and reply is kept in `<out>.journal.jsonl`: the same call goes on where a stopped or killed one
    ended, and a larger `triples` or bound extends it. Which requests are made, and in which order their replies are
    judged, depends on the seed alone, at any concurrency. Ctrl-C waits for the replies under way, which are paid for.

    Args:
        backend: a `ChatEndpoint`, a `LocalModel`, or anything of the shape of `Backend`.
        out: the JSONL file to write (FlagEmbedding's keys); `prompt` is the task's instruction, `source` its kind.
        tasks: how many tasks to brainstorm, shared out evenly among the kinds; or tasks to write triples for.
        triples: how many triples to write, shared out evenly among the tasks.
        languages: languages of the texts, by their English names, drawn evenly or by the weights given.
        kinds: kinds of tasks to brainstorm, keys of `KINDS`.
        max_requests: the most requests over all runs, failed ones included; None for twice what would be needed
            without any failure, and 20.
        max_tokens: the most tokens read and written over all runs; never exceeded if the model keeps to its
            `reply_tokens`, because a request is only sent if its worst case fits. None for no bound.
        seed: decides themes, attributes, languages and the seeds given to the model.
        concurrency: the most requests under way at once.

    Returns:
        `out`. Fewer triples than asked for are a warning that names the bound that ended the run.

    Raises:
        ValueError: for options that ask for nothing, a journal of other settings, a bound that ends the run before the
            first triple, or 50 unusable replies in a row.
        ConnectionError: if the server cannot be reached, or a request failed six times.
    """
    out = Path(out).expanduser()
    languages = dict(languages) if isinstance(languages, Mapping) else dict.fromkeys(_texts(languages), 1.0)
    _check(tasks, triples, languages, kinds, max_requests, max_tokens, concurrency)
    count = tasks if isinstance(tasks, int) else 0
    if max_requests is None:
        max_requests = 2 * (triples + len(kinds) * -(-count // TASKS_A_REPLY)) + 20
    settings = {
        **backend.settings,
        "seed": seed,
        "languages": languages,
        "kinds": list(kinds) if count else [],
        "tasks": count or [asdict(task) for task in tasks],
        "wording": wording(),
    }
    journal = Journal(
        out.with_name(f"{out.name}.journal.jsonl"), settings, max_requests=max_requests, max_tokens=max_tokens
    )
    summary = Summary(str(backend.settings.get("model", "")), wanted=triples)
    rejected: Counter[str] = Counter()
    with Requests(backend, journal, concurrency) as requests:
        task_list = _brainstorm(requests, count, kinds, seed, rejected) if count else list(tasks)
        # triples of half the tasks would be other triples than those of a run that was not stopped
        examples = [] if requests.spent else _write(requests, task_list, triples, languages, seed, rejected)
    summary.tasks, summary.triples, summary.stopped = len(task_list), len(examples), requests.spent
    summary.requests, summary.failed_requests, summary.tokens = journal.requests, journal.failed, journal.tokens
    summary.rejected = dict(rejected.most_common())
    draft = out.with_name(f".{out.name}.summary.json")
    write_json(draft, asdict(summary))
    draft.replace(out.with_name(f"{out.name}.summary.json"))
    if not examples:
        raise ValueError(
            f"{requests.spent} ended the synthesis before the first triple: call it again with a larger bound"
        )
    write_examples(examples, out, "flagembedding")
    if requests.spent:
        logger.warning(
            "%s ended the synthesis with %d of %d triples: call it again with a larger bound to go on",
            *(requests.spent, len(examples), triples),
        )
    return out


def _brainstorm(requests: Requests, count: int, kinds: Sequence[str], seed: int, rejected: Counter[str]) -> list[Task]:
    """Return `count` tasks, as many of each kind as of any other but one, in turns of the kinds."""
    seen = DistinctTexts()
    by_kind: list[list[Task]] = []
    for place, kind in enumerate(kinds):
        share = count // len(kinds) + (place < count % len(kinds))
        found: list[Task] = []
        by_kind.append(found)

        def prompts(kind: str = kind, share: int = share) -> Iterator[Request]:
            for number in itertools.count():
                name = f"tasks/{kind}/{number}"
                rng = random.Random(f"{seed}/{name}")
                prompt = tasks_prompt(kind, min(TASKS_A_REPLY, max(share, 2)), rng)
                yield Request(name, prompt, rng.getrandbits(31))

        def take(_: Request, reply: Reply, kind: str = kind, share: int = share, found: list[Task] = found) -> None:
            if len(found) == share:
                return
            new = [Task(kind, instruction) for instruction in check_tasks(reply) if seen.add(instruction)]
            if not new:
                raise Unusable("duplicate tasks")
            found.extend(new[: share - len(found)])

        _collect(
            f"{kind} tasks",
            requests,
            prompts(),
            take,
            lambda found=found, share=share: -(-(share - len(found)) // TASKS_A_REPLY),
            rejected,
        )
    return [task for turn in itertools.zip_longest(*by_kind) for task in turn if task]


def _write(
    requests: Requests,
    tasks: Sequence[Task],
    count: int,
    languages: Mapping[str, float],
    seed: int,
    rejected: Counter[str],
) -> list[Example]:
    """Return `count` examples, the tasks in turns."""
    examples: list[Example] = []
    queries, long_positives = DistinctTexts(), set()
    task_of: dict[str, Task] = {}

    def prompts() -> Iterator[Request]:
        for number in itertools.count():
            name = f"triples/{number}"
            rng = random.Random(f"{seed}/{name}")
            task_of[name] = tasks[number % len(tasks)]
            language = rng.choices(list(languages), list(languages.values()))[0]
            yield Request(name, triple_prompt(task_of[name], language, rng), rng.getrandbits(31))

    def take(request: Request, reply: Reply) -> None:
        task = task_of.pop(request.name)
        query, positive, negative = check_triple(reply, task)
        # a label is the positive of many texts, a passage that comes twice is a model that repeats itself
        if task.kind.endswith("long") and without_punctuation(positive) in long_positives:
            raise Unusable("duplicate positive")
        if not queries.add(query):
            raise Unusable("duplicate query")
        long_positives.add(without_punctuation(positive))
        examples.append(Example(query, [positive], [negative], prompt=task.instruction, source=task.kind))

    _collect("triples", requests, prompts(), take, lambda: count - len(examples), rejected)
    return examples


def _collect(
    name: str,
    requests: Requests,
    prompts: Iterator[Request],
    take: Callable[[Request, Reply], None],
    wanted: Callable[[], int],
    rejected: Counter[str],
) -> None:
    """Give replies to `take` until none is wanted, counting the unusable ones by reason."""
    useless = 0
    bar = tqdm(requests.replies(prompts, wanted), desc=name, unit=" replies", disable=None)
    for request, reply in bar:
        try:
            take(request, reply)
        except Unusable as reason:
            rejected[str(reason)] += 1
            useless += 1
            if useless == USELESS_IN_A_ROW:
                raise ValueError(
                    f"{useless} replies in a row were unusable (by reason: {dict(rejected)}; the last began "
                    f"{reply.text[:80]!r}): take a stronger model, more reply_tokens, or more tasks"
                ) from reason
        else:
            useless = 0
        bar.set_postfix(still_wanted=max(0, wanted()), refresh=False)


def _texts(values: Sequence[str]) -> Sequence[str]:
    # a bare string would be read letter by letter
    return [values] if isinstance(values, str) else values


def _check(
    tasks: int | Sequence[Task],
    triples: int,
    languages: Mapping[str, float],
    kinds: Sequence[str],
    max_requests: int | None,
    max_tokens: int | None,
    concurrency: int,
) -> None:
    numbers = {"triples": triples, "concurrency": concurrency, "max_requests": max_requests, "max_tokens": max_tokens}
    numbers["tasks"] = tasks if isinstance(tasks, int) else len(tasks)
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: give at least 1")
    given = kinds if isinstance(tasks, int) else [task.kind for task in tasks]
    if unknown := [kind for kind in given if kind not in KINDS]:
        raise ValueError(f"no kind of task {unknown[0]!r}: choose from {', '.join(KINDS)}")
    if not given:
        raise ValueError("kinds is empty: name at least one")
    if not languages or min(languages.values()) < 0 or sum(languages.values()) <= 0:
        raise ValueError(f"languages is {dict(languages)!r}: give at least one, with weights of at least 0")
