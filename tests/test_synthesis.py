"""Synthesis of triples against a local server that speaks the chat-completions protocol, with failures injected."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from textcond.synthesis import KINDS, ChatEndpoint, LocalModel, Reply, Task, synthesize
from textcond.synthesis import requests as requests_module
from textcond.synthesis.journal import BudgetSpent, Journal
from textcond.synthesis.prompts import tasks_prompt, triple_prompt
from textcond.synthesis.validation import Unusable, check_tasks, check_triple

KEY = "sk-never-on-disk"
SYLLABLES = ("ba", "ce", "di", "fo", "gu", "ha", "je", "ki", "lo", "mu")
WORDS = [a + b for a in SYLLABLES for b in ("nar", "ves", "tip", "gol", "ruz")]
TASKS = [Task("short-long", "Given a question, retrieve its answer."), Task("long-short", "Given a text, name it.")]


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(count))


@dataclass
class Server:
    """A server that answers as a language model would; `faults` decides what goes wrong by the number of the call."""

    url: str = ""
    calls: list[dict] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    most_at_once: int = 0
    under_way: int = 0
    faults: dict[int, object] = field(default_factory=dict)
    usage: bool = True
    delay: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def content(self, body: dict) -> str:
        """A right answer, decided by the prompt and the seed as a model's is."""
        prompt, rng = body["messages"][0]["content"], random.Random(body["seed"])
        if count := re.search(r"JSON list of (\d+) strings", prompt):
            return json.dumps([f"Given {words(rng, 5)}, retrieve {words(rng, 4)}." for _ in range(int(count[1]))])
        long = [bool(re.search(rule, prompt)) for rule in ("query is a text of at", "negative are at least")]
        query, *documents = (words(rng, 30 if is_long else 3) for is_long in (long[0], long[1], long[1]))
        return json.dumps({"query": query, "positive": documents[0], "hard_negative": documents[1]})


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    import uvicorn

    app, server = FastAPI(), Server()

    @app.post("/v1/chat/completions")
    def complete(request: Request, body: dict) -> Response:
        with server.lock:
            number = len(server.calls)
            server.calls.append(body)
            server.times.append(time.monotonic())
            server.under_way += 1
            server.most_at_once = max(server.most_at_once, server.under_way)
        try:
            return answer(request, body, server.faults.get(number))
        finally:
            with server.lock:
                server.under_way -= 1

    def answer(request: Request, body: dict, fault: object) -> Response:
        time.sleep(server.delay)
        if request.headers.get("authorization") != f"Bearer {KEY}":
            return JSONResponse({"error": {"message": f"wrong key {request.headers.get('authorization')}"}}, 401)
        if body["model"] != "writer":
            return JSONResponse({"error": {"message": "no such model"}}, 404)
        content, finish = server.content(body), "stop"
        if isinstance(fault, tuple):
            status, headers = fault
            return JSONResponse({"error": {"message": f"busy, {KEY}"}}, status, headers=headers)
        if isinstance(fault, float):
            time.sleep(fault)
        elif fault == "truncated":
            content, finish = content[: len(content) // 2], "length"
        elif fault == "page":
            return Response("<html>gateway</html>", media_type="text/html")
        elif fault == "fenced":
            content = f"<think>{{a plan}}</think>Sure!\n```json\n{content}\n```\nAnything else?"
        elif isinstance(fault, str):
            content = fault
        usage = {"prompt_tokens": 300, "completion_tokens": 100, "total_tokens": 400}
        return JSONResponse(
            {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [
                    {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content}}
                ],
                **({"usage": usage} if server.usage else {}),
            }
        )

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        instance = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=instance.run, args=([listener],), daemon=True)
        thread.start()
        while not instance.started:
            time.sleep(0.01)
        server.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        yield server
        instance.should_exit = True
        thread.join()


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(requests_module, "FIRST_WAIT", 0.02)
    fresh = Server(url=running.url)
    running.__dict__.update({name: value for name, value in fresh.__dict__.items() if name != "lock"})
    return running


def endpoint(server: Server, model: str = "writer", **options) -> ChatEndpoint:
    return ChatEndpoint(model, server.url, **options)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def summary(path: Path) -> dict:
    return json.loads(path.with_name(f"{path.name}.summary.json").read_text())


def test_brainstorms_tasks_of_every_kind_and_writes_triples_of_each(server, tmp_path):
    out = synthesize(endpoint(server), tmp_path / "a.jsonl", tasks=6, triples=12, languages=["English", "Japanese"])
    written = rows(out)
    assert len(written) == 12
    assert Counter(row["prompt"] for row in written).most_common()[-1][1] == 2
    assert {row["source"] for row in written} == set(KINDS)
    assert all(len(row["pos"]) == len(row["neg"]) == 1 and row["pos"] != row["neg"] for row in written)
    asked = [
        body["messages"][0]["content"] for body in server.calls if "Brainstorm" not in body["messages"][0]["content"]
    ]
    assert {re.search(r"All texts are in (\w+)", prompt)[1] for prompt in asked} == {"English", "Japanese"}
    for options in ("less than 5 words|5 to 15 words|at least 10 words", "high school|college|PhD", "clear|ambiguous"):
        assert len({re.search(options, prompt)[0] for prompt in asked if re.search(options, prompt)}) >= 2
    assert summary(out)["tokens"] == 400 * len(server.calls)
    assert summary(out)["stopped"] is None


def test_output_depends_on_the_seed_alone_and_no_request_is_in_vain(server, tmp_path):
    server.delay = 0.01
    texts = []
    for concurrency in (1, 7):
        server.calls.clear()
        out = synthesize(
            endpoint(server), tmp_path / f"{concurrency}.jsonl", tasks=4, triples=15, concurrency=concurrency
        )
        texts.append(out.read_text())
        assert len(server.calls) == 4 + 15
        assert server.most_at_once <= concurrency
    assert server.most_at_once >= 3
    assert texts[0] == texts[1]
    other = synthesize(endpoint(server), tmp_path / "other.jsonl", tasks=4, triples=15, seed=1)
    assert other.read_text() != texts[0]


def test_failures_that_pass_are_retried_and_bad_replies_replaced(server, tmp_path):
    one = json.dumps({"query": "the same", "positive": "p" * 70, "hard_negative": "n" * 70})
    server.faults = {
        0: (429, {"Retry-After": "0.5"}),
        1: (500, {}),
        2: (503, {}),
        4: "truncated",
        5: "fenced",
        6: '{"query": oops}',
        7: one,
        8: one,
        9: "page",
        10: 1.0,
        11: json.dumps({"query": "a", "positive": "b"}),
        12: json.dumps({"query": "q q", "positive": "p" * 70, "hard_negative": "P" * 70}),
    }
    out = synthesize(endpoint(server, timeout=0.6), tmp_path / "a.jsonl", tasks=TASKS[:1], triples=6, concurrency=1)
    assert len(rows(out)) == 6
    assert server.times[1] - server.times[0] >= 0.5
    counts = summary(out)
    assert counts["rejected"] == {
        "cut short": 1,
        "no JSON": 1,
        "duplicate positive": 1,
        "wrong keys": 1,
        "equal texts": 1,
    }
    assert counts["failed_requests"] == 5
    assert counts["requests"] == len(server.calls)
    assert sum(row["query"] == "the same" for row in rows(out)) == 1


def test_a_retry_after_holds_back_the_other_requests(server, tmp_path):
    server.faults = {0: (429, {"Retry-After": "0.6"})}
    server.delay = 0.05
    synthesize(endpoint(server), tmp_path / "a.jsonl", tasks=TASKS, triples=12, concurrency=2)
    # one other request was under way; nothing begins within the wait
    early = [at for at in server.times if 0.1 < at - server.times[0] < 0.55]
    assert not early


def test_the_key_is_never_written_nor_shown(server, tmp_path, caplog):
    server.faults = {0: (500, {})}
    synthesize(endpoint(server), tmp_path / "a.jsonl", tasks=TASKS, triples=3)
    assert len(list(tmp_path.iterdir())) == 3
    assert not any(KEY in path.read_text() for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match="401") as caught:
        synthesize(endpoint(server, api_key=f"{KEY}x"), tmp_path / "b.jsonl", tasks=TASKS, triples=3)
    assert f"{KEY}x" not in str(caught.value)
    assert KEY not in caplog.text


def test_a_bound_before_the_first_triple_is_an_error_that_says_so_and_is_gone_on_from(server, tmp_path):
    out = tmp_path / "a.jsonl"
    with pytest.raises(ValueError, match="max_requests=4 ended the synthesis before the first triple"):
        synthesize(endpoint(server), out, tasks=8, triples=4, max_requests=4)
    assert not out.exists()
    synthesize(endpoint(server), out, tasks=8, triples=4, max_requests=8)
    assert len(rows(out)) == 4
    assert len(server.calls) == 8


@pytest.mark.parametrize(("bound", "requests"), [({"max_requests": 7}, 7), ({"max_tokens": 400 * 6 + 4000}, 20)])
def test_a_bound_ends_the_run_cleanly_and_a_larger_one_goes_on(server, tmp_path, caplog, bound, requests):
    out = synthesize(endpoint(server), tmp_path / "a.jsonl", tasks=TASKS, triples=40, **bound)
    stopped = rows(out)
    assert 1 <= len(stopped) < 40
    assert len(server.calls) <= requests
    assert summary(out)["tokens"] == 400 * len(server.calls) <= bound.get("max_tokens", 10**9)
    name, value = next(iter(bound.items()))
    assert f"{name}={value} ended the synthesis with {len(stopped)} of 40 triples" in caplog.text
    synthesize(endpoint(server), out, tasks=TASKS, triples=40)
    whole = synthesize(endpoint(server), tmp_path / "whole.jsonl", tasks=TASKS, triples=40)
    assert out.read_text() == whole.read_text()
    assert len(server.calls) == 80


def test_a_server_without_usage_is_charged_the_worst_case(server, tmp_path):
    server.usage = False
    out = synthesize(endpoint(server), tmp_path / "a.jsonl", tasks=TASKS, triples=40, max_tokens=10_000)
    assert 1 <= len(server.calls) <= 10_000 // 1536
    assert summary(out)["tokens"] + 3000 > 8000
    assert summary(out)["tokens"] <= 10_000


def test_a_killed_run_goes_on_where_it_ended(server, tmp_path):
    whole = synthesize(endpoint(server), tmp_path / "whole.jsonl", tasks=4, triples=20)
    out = tmp_path / "killed.jsonl"
    server.calls.clear()
    server.delay = 0.05
    code = (
        "from textcond.synthesis import *; import sys\n"
        "synthesize(ChatEndpoint('writer', sys.argv[1]), sys.argv[2], tasks=4, triples=20, concurrency=2)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, server.url, str(out)])
    while len(server.calls) < 12:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    journal = out.with_name("killed.jsonl.journal.jsonl")
    begun = len(server.calls)
    with journal.open("ab") as file:
        file.write(b'{"answer": 99, "request": "triples/5", "te')
    synthesize(endpoint(server), out, tasks=4, triples=20, concurrency=2)
    assert out.read_text() == whole.read_text()
    # the two that were under way are asked again
    assert len(server.calls) <= 24 + 2
    assert len(server.calls) > begun
    assert summary(out)["requests"] == len(server.calls)
    calls = len(server.calls)
    synthesize(endpoint(server), out, tasks=4, triples=20)
    assert len(server.calls) == calls


def test_a_journal_of_other_settings_or_a_damaged_one_is_refused(server, tmp_path):
    out = synthesize(endpoint(server), tmp_path / "a.jsonl", tasks=TASKS, triples=2)
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        synthesize(endpoint(server), out, tasks=TASKS, triples=2, seed=1)
    with pytest.raises(ValueError, match=r"temperature was 1\.0 and is 0\.5"):
        synthesize(endpoint(server, temperature=0.5), out, tasks=TASKS, triples=2)
    journal = out.with_name("a.jsonl.journal.jsonl")
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([lines[0], lines[1][:-5], *lines[2:]]) + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl\.journal\.jsonl, line 2 is damaged"):
        synthesize(endpoint(server), out, tasks=TASKS, triples=2)


def test_one_clear_error_for_what_waiting_does_not_mend(server, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"'reader' with 404.*has a model 'reader'"):
        synthesize(endpoint(server, "reader"), tmp_path / "a.jsonl", tasks=TASKS, triples=5)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match=r"401.*set OPENAI_API_KEY"):
        synthesize(endpoint(server), tmp_path / "b.jsonl", tasks=TASKS, triples=5)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = ChatEndpoint("writer", f"http://127.0.0.1:{unused.getsockname()[1]}/v1")
        with pytest.raises(ConnectionError, match="nothing answers at"):
            synthesize(nobody, tmp_path / "c.jsonl", tasks=TASKS, triples=5)
    with pytest.raises(ValueError, match="whole address"):
        ChatEndpoint("writer", "localhost:8000/v1")


def test_a_server_that_stays_down_ends_the_run_and_its_replies_are_kept(server, tmp_path):
    server.faults = dict.fromkeys(range(3, 40), (503, {}))
    out = tmp_path / "a.jsonl"
    with pytest.raises(ConnectionError, match=r"6 attempts failed.*503"):
        synthesize(endpoint(server), out, tasks=TASKS, triples=5, concurrency=1)
    assert len(server.calls) == 3 + 6
    server.faults = {}
    synthesize(endpoint(server), out, tasks=TASKS, triples=5, concurrency=1)
    assert len(rows(out)) == 5
    assert len(server.calls) == 9 + 2


def test_a_model_that_only_writes_nonsense_is_given_up(server, tmp_path):
    server.faults = dict.fromkeys(range(200), "I cannot help with that.")
    with pytest.raises(ValueError, match=r"50 replies in a row were unusable.*no JSON.*I cannot help"):
        synthesize(endpoint(server), tmp_path / "a.jsonl", tasks=TASKS, triples=100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"triples": 0}, "triples is 0"),
        ({"tasks": []}, "tasks is 0"),
        ({"tasks": [Task("poem", "Write.")]}, "no kind of task 'poem'"),
        ({"kinds": ["poem"]}, "no kind of task 'poem'"),
        ({"languages": {}}, "languages is {}"),
        ({"languages": {"English": -1.0}}, "weights of at least 0"),
        ({"max_requests": 0}, "max_requests is 0"),
    ],
)
def test_options_that_ask_for_nothing_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        synthesize(ChatEndpoint("m", "http://127.0.0.1:9/v1"), tmp_path / "a.jsonl", **options)
    assert not list(tmp_path.iterdir())


def test_extra_fields_of_the_request_reach_the_server_and_none_takes_one_out(server, tmp_path):
    options = {"max_tokens": None, "max_completion_tokens": 99, "response_format": {"type": "json_object"}}
    synthesize(endpoint(server, options=options), tmp_path / "a.jsonl", tasks=TASKS, triples=1)
    body = server.calls[0]
    assert "max_tokens" not in body
    assert (body["max_completion_tokens"], body["response_format"]) == (99, {"type": "json_object"})
    assert isinstance(body["seed"], int)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_decided_by_its_generator_and_asks_for_the_sides_of_its_kind(kind):
    task = Task(kind, "Find it.")
    prompts = {triple_prompt(task, "Swahili", random.Random(seed)) for seed in range(50)}
    assert len(prompts) > 20
    assert triple_prompt(task, "Swahili", random.Random(3)) in prompts
    assert all("Swahili" in prompt and "Find it." in prompt for prompt in prompts)
    assert all(("query is a text of at least" in prompt) == kind.startswith("long") for prompt in prompts)
    assert all(("negative are at most 15" in prompt) == kind.endswith("short") for prompt in prompts)
    assert len({tasks_prompt(kind, 20, random.Random(seed)) for seed in range(50)}) > 10


LONG, OTHER = "a long passage of text " * 5, "another long passage here " * 5


@pytest.mark.parametrize(
    ("triple", "reason"),
    [
        ({"query": "q", "positive": LONG, "hard_negative": OTHER}, "short text of the wrong length"),
        ({"query": "where is it", "positive": "here", "hard_negative": OTHER}, "long text of the wrong length"),
        ({"query": " ?! ", "positive": LONG, "hard_negative": OTHER}, "empty text"),
        ({"query": LONG.upper(), "positive": LONG, "hard_negative": OTHER}, "equal texts"),
        ({"query": "where is it", "positive": LONG, "hard_negative": f"{LONG}!"}, "equal texts"),
        ({"query": "where is it", "positive": [LONG], "hard_negative": OTHER}, "wrong keys"),
        ({"query": "where is it", "positive": LONG, "negative": OTHER}, "wrong keys"),
        ({"query": "where \ud83d is it", "positive": LONG, "hard_negative": OTHER}, "broken characters"),
    ],
)
def test_a_triple_with_a_fault_is_not_kept(triple, reason):
    with pytest.raises(Unusable, match=reason):
        check_triple(Reply(json.dumps(triple), 1), TASKS[0])
    right = {"query": " where is it\n", "positive": LONG, "hard_negative": OTHER, "language": "English"}
    assert check_triple(Reply(f"{{note}} {json.dumps(right)}", 1), TASKS[0])[0] == "where is it"


def test_line_breaks_inside_strings_are_let_through():
    text = f'{{"query": "where is it", "positive": "{LONG}\n\nmore", "hard_negative": "{OTHER}"}}'
    assert check_triple(Reply(text, 1), TASKS[0])[1].endswith("\n\nmore")


def test_a_brainstorm_may_be_wrapped_and_copies_of_the_examples_are_left_out():
    example = KINDS["long-long"][1]
    reply = Reply(json.dumps({"tasks": [example, "Given a riddle, find its\n solver.", 7, "short"]}), 1)
    assert check_tasks(reply) == ["Given a riddle, find its solver."]
    with pytest.raises(Unusable, match="no tasks"):
        check_tasks(Reply(json.dumps([example]), 1))


def test_bounds_of_tokens_wait_for_replies_under_way_before_giving_up(tmp_path):
    journal = Journal(tmp_path / "j", {}, max_requests=9, max_tokens=1000)
    first = journal.ask("a", 900)
    threading.Timer(0.1, journal.answer, (first, "a", Reply("text", 100))).start()
    begun = time.monotonic()
    journal.ask("b", 900)
    assert time.monotonic() - begun > 0.05
    with pytest.raises(BudgetSpent, match="max_tokens=1000"):
        journal.ask("c", 950)
    journal.close()
    # a request without an outcome is charged in full by the run that goes on
    again = Journal(tmp_path / "j", {}, max_requests=9, max_tokens=1000)
    assert (again.requests, again.failed, again.tokens) == (2, 1, 1000)
    assert again.reply("a") == Reply("text", 100)
    again.close()


def save_causal_model(folder: Path, template: str | None = None) -> Path:
    tokenizer = tiny.tokenizer("gpt", 4096)
    tokenizer.chat_template = template
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


TEMPLATE = (
    "{% for m in messages %}user : {{ m.content }} {% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_local_model_replies_by_seed_with_and_without_a_chat_template(tmp_path, template):
    model = LocalModel(save_causal_model(tmp_path / "m", template), reply_tokens=12)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = model.complete("say something", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.complete("say something", seed=1) == first
    assert model.complete("say something", seed=2).text != first.text
    prompt_tokens = first.tokens - 12
    assert not first.complete
    # one token a character; the template adds "user : " and " assistant :"
    assert prompt_tokens == 12 + (len("user:assistant:") if template else 0)


def test_a_local_model_that_writes_nonsense_is_given_up_with_its_words(tmp_path):
    model = LocalModel(save_causal_model(tmp_path / "m"), reply_tokens=4, temperature=0)
    with pytest.raises(ValueError, match="50 replies in a row were unusable"):
        synthesize(model, tmp_path / "a.jsonl", tasks=TASKS, triples=60, max_requests=60)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="`transformers serve` needs the openai package")
def test_the_server_of_transformers_answers_what_is_asked(tmp_path):
    model = save_causal_model(tmp_path / "m", TEMPLATE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = "from transformers.cli.transformers import main; main()"
    process = subprocess.Popen([sys.executable, "-c", serve, "serve", str(model), "--port", str(port)])
    try:
        backend = ChatEndpoint(str(model), f"http://127.0.0.1:{port}/v1", reply_tokens=8)
        deadline = time.monotonic() + 120
        while True:
            try:
                reply = backend.complete("say something", seed=1)
                break
            except ConnectionError:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.5)
        assert reply.text
        assert not reply.complete
        assert reply.tokens == 12 + len("user:assistant:") + 8
        with pytest.raises(ValueError, match="50 replies in a row were unusable"):
            synthesize(backend, tmp_path / "a.jsonl", tasks=TASKS, triples=60)
    finally:
        process.terminate()
        process.wait()
