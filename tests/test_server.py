import base64
import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
import tiny
import uvicorn
from PIL import Image

from textcond import PromptIndex
from textcond.apps.cli import main
from textcond.apps.server import gate, messages
from textcond.apps.server.app import create_app
from textcond.apps.server.batching import Batcher

TEXTS = ["a red fox in winter", "the dog", "a green bird", "ein Haus am See", "赤いりんご"]
MODEL = "tiny"


class SlowEncoder:
    """A text encoder that waits for `go` before each batch, and remembers the batches."""

    def __init__(self, encoder):
        self._encoder, self.go, self.batches = encoder, threading.Event(), []

    def __getattr__(self, name):
        return getattr(self._encoder, name)

    def encode(self, texts, **options):
        self.batches.append(list(texts))
        assert self.go.wait(60)
        if "poison" in texts:
            raise RuntimeError("this text is poison")
        return self._encoder.encode(texts, **options)


@pytest.fixture
def encoder():
    return tiny.text_encoder("bert", prompts={"query": "query: ", "document": ""})


@pytest.fixture
def slow(encoder):
    slow = SlowEncoder(encoder)
    yield slow
    slow.go.set()


@pytest.fixture
def index(encoder):
    index = PromptIndex(encoder)
    colours = [Image.new("RGB", (8, 8), (60 * number, 0, 0)) for number in range(4)]
    index.add(
        TEXTS,
        metadata=[{"row": number, "style": "noto" if number < 3 else "blob"} for number in range(5)],
        images=[*colours, None],
        ids=[f"row{number}" for number in range(5)],
    )
    return index


@contextlib.contextmanager
def serving(*arguments, **options):
    """A real server of the application in this process; gives its address."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    app = create_app(*arguments, **{"model": MODEL, **options})
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=10))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def client(address, **options):
    return openai.OpenAI(base_url=f"{address}/v1", **{"api_key": "none", "max_retries": 0, **options})


def message(response):
    """The one message of a refusal, which is one line."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].strip()
    assert "\n" not in error["message"]
    return error["message"]


# batching


def test_texts_that_wait_together_are_encoded_together_and_each_request_gets_its_own(slow, encoder):
    requests = [([text, text[:3]], kind) for text, kind in zip(TEXTS, ["query", None] * 3)]
    expected = [encoder.encode(texts, kind=kind) for texts, kind in requests]
    batcher = Batcher(slow)
    first = batcher.submit(["first"])
    _until(lambda: slow.batches)
    futures = [batcher.submit(texts, kind) for texts, kind in requests]
    slow.go.set()
    assert len(first.result(60).vectors) == 1
    for vectors, future in zip(expected, futures):
        np.testing.assert_allclose(future.result(60).vectors, vectors, atol=1e-5)
    batcher.stop()
    assert sorted(map(len, slow.batches)) == [1, 4, 6]  # one call for each prompt


def test_a_long_request_does_not_keep_a_short_one_waiting(slow):
    batcher = Batcher(slow, batch_tokens=100)
    long = batcher.submit(["a long request"] * 500)
    _until(lambda: slow.batches)
    short = batcher.submit(["a short one"])
    slow.go.set()
    short.result(60)
    assert not long.done()
    assert len(long.result(60).vectors) == 500
    place = next(number for number, batch in enumerate(slow.batches) if "a short one" in batch)
    batcher.stop()
    assert place == 1


def test_batches_hold_the_tokens_that_they_may_and_one_text_at_least(slow, encoder):
    slow.go.set()
    batcher = Batcher(slow, batch_tokens=20)
    texts = ["abc", "abcdef", "abcdefghijklmnopqrstuvwxyz abcdefg", *["a"] * 30]
    batcher.submit(texts).result(60)
    batcher.stop()
    assert [text for batch in slow.batches for text in batch] == texts
    for batch in slow.batches:
        assert len(batch) == 1 or encoder.tokenize(batch)["input_ids"].ne(encoder.tokenizer.pad_token_id).sum() <= 20
    assert len(slow.batches) < 15


def test_a_text_that_cannot_be_encoded_fails_its_own_request_only(slow):
    batcher = Batcher(slow)
    first = batcher.submit(["first"])
    _until(lambda: slow.batches)
    good, bad = batcher.submit(["good"]), batcher.submit(["poison"])
    slow.go.set()
    assert len(good.result(60).vectors) == 1
    with pytest.raises(RuntimeError, match="poison"):
        bad.result(60)
    first.result(60)
    assert len(batcher.submit(["after"]).result(60).vectors) == 1
    batcher.stop()


def test_a_stopped_batcher_finishes_what_it_has_and_takes_no_more(slow):
    batcher = Batcher(slow)
    futures = [batcher.submit([text]) for text in TEXTS]
    slow.go.set()
    batcher.stop()
    assert all(future.done() for future in futures)
    assert not batcher.alive
    with pytest.raises(RuntimeError, match="shutting down"):
        batcher.submit(["late"])


# the OpenAI protocol


def test_the_openai_client_gets_the_encoders_vectors(encoder):
    with serving(encoder) as address:
        api = client(address)
        assert [model.id for model in api.models.list()] == [MODEL]
        for options in ({}, {"encoding_format": "float"}, {"dimensions": encoder.dim}):
            answer = api.embeddings.create(model=MODEL, input=TEXTS, **options)
            assert [row.index for row in answer.data] == list(range(len(TEXTS)))
            np.testing.assert_allclose([row.embedding for row in answer.data], encoder.encode(TEXTS), atol=1e-5)
        one = api.embeddings.create(model=MODEL, input="the dog", extra_body={"kind": "query"})
        np.testing.assert_allclose(one.data[0].embedding, encoder.encode("the dog", kind="query"), atol=1e-5)
        assert one.usage.prompt_tokens == one.usage.total_tokens == len("query:thedog") + 2


def test_what_the_encoder_cannot_read_to_its_end_is_told(encoder):
    with serving(encoder) as address:
        answer = client(address).embeddings.create(model=MODEL, input=["short", "long " * 40])
    assert answer.truncated == [1]
    assert answer.usage.prompt_tokens == len("short") + 2 + encoder.max_length


def test_the_openai_client_understands_every_refusal(encoder):
    with serving(encoder, api_key="schlüssel") as address:
        with pytest.raises(openai.AuthenticationError, match="API key"):
            client(address, api_key="wrong").models.list()
        # a header holds bytes, and the client takes no key beyond ASCII
        headers = {"Authorization": "Bearer schlüssel".encode()}
        body = {"model": MODEL, "input": "hello"}
        assert httpx.post(f"{address}/v1/embeddings", json=body, headers=headers).status_code == 200
        assert httpx.post(f"{address}/v1/embeddings", json=body).status_code == 401
        assert httpx.get(f"{address}/metrics").status_code == 401
        assert httpx.get(f"{address}/health").json() == {"status": "ok", "model": MODEL}
    with serving(encoder, api_key="key") as address:
        api = client(address, api_key="key")
        with pytest.raises(openai.NotFoundError, match=r"no model 'gpt'.*'tiny'"):
            api.embeddings.create(model="gpt", input="hello")
        with pytest.raises(openai.BadRequestError, match="token ids"):
            api.embeddings.create(model=MODEL, input=[[1, 2, 3]])
        with pytest.raises(openai.BadRequestError, match="cannot be cut from 32"):
            api.embeddings.create(model=MODEL, input="hello", dimensions=8)


def test_sixty_four_clients_at_once_all_get_their_own(encoder):
    texts = [f"prompt number {number}" for number in range(64)]
    expected = encoder.encode(texts)
    with serving(encoder) as address, ThreadPoolExecutor(64) as threads:
        api = client(address)

        def ask(number):
            return [
                np.array(api.embeddings.create(model=MODEL, input=texts[number]).data[0].embedding) for _ in range(3)
            ]

        for number, vectors in enumerate(threads.map(ask, range(64))):
            for vector in vectors:
                np.testing.assert_allclose(vector, expected[number], atol=1e-5)
        page = httpx.get(f"{address}/metrics").text
    assert 'textcond_requests_total{path="/v1/embeddings",status="200"} 192' in page
    assert "textcond_texts_total 192" in page
    assert int(re.search(r"textcond_batch_seconds_count (\d+)", page)[1]) < 150


def test_a_full_server_refuses_at_once_and_recovers(slow):
    with serving(slow, queue=4) as address, ThreadPoolExecutor(12) as threads:

        def ask(_):
            return httpx.post(f"{address}/v1/embeddings", json={"model": MODEL, "input": "hello"}, timeout=60)

        waiting = [threads.submit(ask, number) for number in range(12)]
        _until(lambda: sum(future.done() for future in waiting) == 8)
        # all of them while the encoder does not move
        refused = [future.result() for future in waiting if future.done()]
        assert httpx.get(f"{address}/health").status_code == 200
        # this client tries again by itself, as Retry-After asks for, and meanwhile the server has recovered
        later = threads.submit(client(address, max_retries=3).embeddings.create, model=MODEL, input="hello")
        time.sleep(0.2)
        slow.go.set()
        answered = [future.result().status_code for future in waiting]
        assert len(later.result().data) == 1
        page = httpx.get(f"{address}/metrics").text
    assert sorted(answered) == [200] * 4 + [503] * 8
    for response in refused:
        assert response.headers["Retry-After"] == "1"
        assert "busy with 4 requests" in message(response)
    assert "textcond_requests_in_work 0" in page


def test_bodies_together_are_bounded_too(slow, monkeypatch):
    monkeypatch.setattr(gate, "MAX_BODIES", 3000)
    body = {"model": MODEL, "input": "x" * 2000}
    with serving(slow) as address, ThreadPoolExecutor(1) as threads:
        first = threads.submit(httpx.post, f"{address}/v1/embeddings", json=body, timeout=30)
        _until(lambda: slow.batches)
        second = httpx.post(f"{address}/v1/embeddings", json=body)
        slow.go.set()
        assert (second.status_code, second.headers["Retry-After"]) == (503, "1")
        assert first.result().status_code == 200
        assert httpx.post(f"{address}/v1/embeddings", json=body).status_code == 200


# search


def test_search_finds_by_text_picture_vector_and_row(encoder, index):
    with serving(encoder, index) as address:

        def found(**body):
            response = httpx.post(f"{address}/search", json=body)
            assert response.status_code == 200, response.text
            return response.json()["hits"]

        top = found(text="the dog", k=2)
        assert len(top) == 2
        assert (top[0]["id"], top[0]["text"], top[0]["metadata"]) == ("row1", "the dog", {"row": 1, "style": "noto"})
        assert top[0]["lexical_rank"] == 1
        assert top[0]["image"] is None
        vector = encoder.encode("a green bird", kind="document")
        by_vector = found(vector=vector.tolist(), mode="dense", k=1)
        assert by_vector[0]["id"] == "row2"
        assert by_vector[0]["score"] == pytest.approx(1, abs=1e-3)
        assert "row3" not in [hit["id"] for hit in found(id="row3", mode="dense")]
        assert {hit["id"] for hit in found(text="bird", filter={"style": "blob"})} <= {"row3", "row4"}
        picture = found(text="the dog", k=1, images=True)[0]["image"]
        assert Image.open(io.BytesIO(base64.b64decode(picture))).size == (8, 8)


def test_a_picture_is_encoded_in_the_encoders_thread_and_finds_texts(encoder, index):
    class PictureEncoder(SlowEncoder):
        def encode_image(self, images):
            assert [image.size for image in images] == [(4, 4)]
            self.threads = [threading.current_thread().name]
            return self._encoder.encode(["the dog"] * len(images), kind="document")

    pictures = PictureEncoder(encoder)
    with serving(pictures, index) as address:
        picture = _png(Image.new("RGB", (4, 4)))
        for content in (picture, f"data:image/png;base64,{picture}"):
            response = httpx.post(f"{address}/search", json={"image": content, "k": 1})
            assert response.status_code == 200, response.text
            assert response.json()["hits"][0]["id"] == "row1"
    assert pictures.threads == ["textcond-encoder"]


def test_clients_write_only_where_the_server_lets_them(encoder, index):
    with serving(encoder, index) as address:
        for path in ("/add", "/delete"):
            refused = httpx.post(f"{address}{path}", json={"texts": ["new"], "ids": ["row0"]})
            assert refused.status_code == 403
            assert "--writable" in message(refused)
        assert "/add" not in httpx.get(f"{address}/openapi.json").json()["paths"]


def test_a_writable_server_adds_replaces_and_deletes(encoder, index):
    with serving(encoder, index, writable=True) as address:

        def post(path, **body):
            return httpx.post(f"{address}{path}", json=body)

        picture = _png(Image.new("RGB", (4, 4), (0, 255, 0)))
        made = post("/add", texts=["a purple whale"], metadata=[{"row": 9}], images=[picture], ids=["whale"])
        assert made.json() == {"ids": ["whale"]}
        assert post("/search", text="a purple whale", k=1).json()["hits"][0]["id"] == "whale"
        again = post("/add", texts=["another whale"], ids=["whale"])
        assert again.status_code == 400
        assert "whale" in message(again)
        assert post("/add", texts=["a blue whale"], ids=["whale"], replace=True).status_code == 200
        assert post("/search", text="a blue whale", k=1).json()["hits"][0]["text"] == "a blue whale"
        assert post("/delete", ids=["whale"]).json() == {"deleted": 1}
        assert post("/delete", filter={"style": "blob"}).json() == {"deleted": 2}
        assert "ids or a filter" in message(post("/delete"))
        assert "ids or a filter" in message(post("/delete", filter={}))
        assert len(index) == 3


# bad input


def _png(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _bomb(width, height):
    """A PNG that says how large it is, and holds next to nothing."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    content = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + header + content + chunk(b"IEND", b"")).decode()


def _damaged():
    content = base64.b64decode(_png(Image.effect_noise((64, 64), 50)))
    return base64.b64encode(content[: len(content) // 2]).decode()


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 400, "exactly one of text, image, vector and id, got none"),
        ({"text": "a", "id": "row0"}, 400, "got text and id"),
        ({"text": ""}, 400, "empty"),
        ({"text": " \n"}, 400, "empty"),
        ({"text": "x" * 2**20}, 400, "text: the text has 1,048,576 characters"),
        ({"text": 5}, 400, "text: the text is a number"),
        ({"text": "a", "k": 0}, 400, "k: "),
        ({"text": "a", "k": 10**30}, 400, "k: "),
        ({"text": "a", "mode": "magic"}, 400, "mode: .*'hybrid', 'dense' or 'lexical'"),
        ({"text": "a", "limit": 5}, 400, "unknown field 'limit'"),
        ({"text": "a", "diversity": 2}, 400, "diversity: "),
        ({"text": "a", "filter": {"row": {"near": 3}}}, 400, "row.*near"),
        ({"text": "a", "filter": {"row": {}}}, 400, "row"),
        ({"text": "a", "filter": {"row": [[1]]}}, 400, "row"),
        ({"text": "a", "filter": "row = 1"}, 400, "filter: "),
        ({"vector": [1.0, 2.0]}, 400, r"\(2,\).*32"),
        ({"vector": []}, 400, r"\(0,\)"),
        ({"vector": [0.0] * 32}, 400, "zero"),
        ({"vector": ["a"] * 32}, 400, "vector.0: "),
        ({"vector": [1.0] * 70_000}, 400, "vector: "),
        ({"id": "nobody"}, 404, "nobody"),
        ({"image": "!!"}, 400, "image is not base64"),
        ({"image": _png(Image.new("RGB", (4, 4)))}, 400, "reads no pictures"),
        ({"image": base64.b64encode(b"no picture").decode()}, 400, "not a readable PNG"),
        ({"image": base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0").decode()}, 400, "not a readable PNG"),
        ({"image": _damaged()}, 400, "damaged"),
        ({"image": _bomb(30_000, 30_000)}, 400, "pixels"),
        ({"image": _bomb(2**31 - 1, 2**31 - 1)}, 400, "pixels"),
    ],
    ids=lambda value: str(value)[:30] if not isinstance(value, str) else None,
)
def test_a_bad_search_is_refused_with_one_message(shared, body, status, words):
    response = httpx.post(f"{shared}/search", json=body)
    assert response.status_code == status, response.text
    assert re.search(words, message(response)), message(response)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no JSON object"),
        (b"[]", "no JSON object"),
        (b"{", "not JSON"),
        (b"\xff\xfe", ""),
        (b"[" * 100_000, ""),
        (b'{"vector": [' + b"NaN," * 31 + b"NaN]}", "vector.0: "),
        (b'{"vector": [1e999' + b",0" * 31 + b"]}", "vector.0: "),
        (b'{"text": "a", "diversity": NaN}', "diversity: "),
        (b'{"text": "a", "filter": {"row": NaN}}', "row"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": "a", "k": ' + b"9" * 5000 + b"}", ""),
    ],
)
def test_a_bad_body_is_refused_with_one_message(shared, content, words):
    response = httpx.post(f"{shared}/search", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    assert re.search(words, message(response)), message(response)


def test_a_page_of_another_site_cannot_make_a_browser_write(encoder, index):
    with serving(encoder, index, writable=True) as address:
        # what a form may send without asking first; JSON it may not
        for kind in ("text/plain", "application/x-www-form-urlencoded"):
            body = json.dumps({"filter": {"style": "noto"}})
            response = httpx.post(f"{address}/delete", content=body, headers={"Content-Type": kind})
            assert response.status_code == 400
            assert "application/json" in message(response)
        asked = httpx.options(
            f"{address}/delete", headers={"Origin": "http://evil", "Access-Control-Request-Method": "POST"}
        )
        assert "access-control-allow-origin" not in asked.headers
    assert len(index) == 5


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "empty list"),
        (["fine", ""], "text 1 is empty"),
        (["fine", 3], "text 1 is a number"),
        ([1, 2], "token ids"),
        ([[1], [2]], "token ids"),
        (None, "null"),
        (["a"] * (messages.MAX_INPUTS + 1), "2,049 texts"),
        ({"text": "a"}, "an object"),
    ],
)
def test_bad_embedding_input_is_refused_with_one_message(shared, value, words):
    response = httpx.post(f"{shared}/v1/embeddings", json={"model": MODEL, "input": value})
    assert response.status_code == 400
    assert words in message(response)


def test_other_mistakes_have_a_clear_message(shared):
    missing = httpx.post(f"{shared}/v1/embeddings", json={"input": "a"})
    assert (missing.status_code, message(missing)) == (400, "the field 'model' is missing")
    kind = httpx.post(f"{shared}/v1/embeddings", json={"model": MODEL, "input": "a", "kind": "poem"})
    assert "document, query" in message(kind)
    nothing = httpx.get(f"{shared}/nothing")
    assert nothing.status_code == 404
    assert "/v1/embeddings" in message(nothing)
    method = httpx.get(f"{shared}/search")
    assert (method.status_code, method.headers["Allow"]) == (405, "POST")


def test_a_giant_body_is_refused_before_it_is_read(shared):
    connection = http.client.HTTPConnection(shared.removeprefix("http://"), timeout=10)
    connection.putrequest("POST", "/search")
    connection.putheader("Content-Length", str(10**12))
    connection.endheaders()
    response = connection.getresponse()
    assert response.status == 413
    assert "1,000,000,000,000 bytes" in json.loads(response.read())["error"]["message"]


def test_a_body_of_unknown_length_is_cut_off(shared):
    def endless():
        for _ in range(2 * gate.MAX_BODY // 2**20):
            yield b" " * 2**20

    try:
        response = httpx.post(f"{shared}/search", content=endless(), timeout=30)
    except httpx.WriteError:
        pass  # the server has hung up before the client looked
    else:
        assert response.status_code == 413
    assert httpx.get(f"{shared}/health").status_code == 200


def test_a_sender_that_stalls_loses_its_place(encoder, monkeypatch):
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.2)
    with serving(encoder, queue=1) as address:
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)
        connection.putrequest("POST", "/v1/embeddings")
        connection.putheader("Content-Length", "100")
        connection.endheaders(b"{")
        assert connection.getresponse().status == 408
        assert len(client(address).embeddings.create(model=MODEL, input="hello").data) == 1


def test_a_server_without_an_index_says_how_to_get_one(encoder):
    with serving(encoder) as address:
        response = httpx.post(f"{address}/search", json={"text": "a"})
    assert response.status_code == 404
    assert "--index" in message(response)


def test_a_failure_of_the_server_is_told_and_passes(encoder, index, monkeypatch):
    with serving(encoder, index) as address:
        with monkeypatch.context() as patch:
            patch.setattr(PromptIndex, "search", lambda *_, **__: 1 / 0)
            response = httpx.post(f"{address}/search", json={"text": "a"})
        assert response.status_code == 500
        assert "division by zero" in message(response)
        assert httpx.post(f"{address}/search", json={"text": "a"}).status_code == 200


def test_metrics_are_in_the_prometheus_format(encoder):
    with serving(encoder) as address:
        client(address).embeddings.create(model=MODEL, input=["one", "two"])
        httpx.get(f'{address}/a"b\\c')
        response = httpx.get(f"{address}/metrics")
    assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    sample = re.compile(r'[a-z_]+(\{[a-z]+="[^"\n]*"(,[a-z]+="[^"\n]*")*\})? [0-9.e+-]+')
    for line in response.text.splitlines():
        assert line.startswith(("# HELP ", "# TYPE ")) or sample.fullmatch(line), line
    assert "textcond_texts_total 2" in response.text
    assert "textcond_tokens_total 10" in response.text
    counts = re.findall(r'textcond_request_seconds_bucket\{path="/v1/embeddings",le="[^"]+"\} (\d+)', response.text)
    assert list(map(int, counts)) == sorted(map(int, counts))
    assert counts[-1] == "1"


# the command


@pytest.fixture
def command(tmp_path):
    """Start `textcond serve` with options; gives the process and its address once it answers."""
    processes = []

    def start(*options):
        process = subprocess.Popen(
            [sys.executable, "-m", "textcond.apps.cli", "serve", "--port", "0", *options],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TEXTCOND_API_KEY": "key", "OMP_NUM_THREADS": "1"},
        )
        processes.append(process)
        address = process.stdout.readline().strip()
        _until(lambda: _answers(address))
        return process, address

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_sigterm_finishes_what_is_in_flight_and_refuses_new(command, encoder, tmp_path):
    encoder.save_pretrained(tmp_path / "tiny-encoder")
    process, address = command("--encoder", str(tmp_path / "tiny-encoder"))
    place = address.removeprefix("http://")
    body = json.dumps({"model": "tiny-encoder", "input": TEXTS}).encode()
    connection = http.client.HTTPConnection(place, timeout=20)
    connection.putrequest("POST", "/v1/embeddings")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Authorization", "Bearer key")
    connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body[:10])
    _until(lambda: _in_work(address) == 1)

    process.send_signal(signal.SIGTERM)
    _until(lambda: not _answers(address))
    assert process.poll() is None
    connection.send(body[10:])
    response = connection.getresponse()
    assert response.status == 200
    assert len(json.loads(response.read())["data"]) == len(TEXTS)
    assert process.wait(20) == 0


@pytest.mark.slow
def test_without_options_the_reference_model_is_served_with_its_index(command):
    _, address = command()
    assert [model.id for model in client(address, api_key="key").models.list()] == ["multilingual"]
    found = httpx.post(
        f"{address}/search", json={"text": "a red apple"}, headers={"Authorization": "Bearer key"}, timeout=60
    ).json()
    assert "apple" in found["hits"][0]["text"]


def test_a_port_in_use_is_told_before_anything_is_loaded(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        started = time.monotonic()
        with pytest.raises(SystemExit, match="1"):
            main(["serve", "--port", str(taken.getsockname()[1])])
    assert time.monotonic() - started < 2
    err = capsys.readouterr().err
    assert err.startswith("textcond: error: cannot listen on 127.0.0.1:")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--writable"], "pass --index"),
        (["--api-key", " "], "API key is empty"),
        (["--host", "256.0.0.1"], "cannot listen on 256.0.0.1"),
        (["--port", "0", "--encoder", "nowhere"], "nowhere"),
    ],
)
def test_options_that_cannot_work_are_one_line(capsys, options, words):
    with pytest.raises(SystemExit, match="1"):
        main(["serve", *options])
    err = capsys.readouterr().err
    assert words in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.fixture(scope="module")
def shared():
    """One server for all that is refused."""
    encoder = tiny.text_encoder("bert")
    index = PromptIndex(encoder)
    index.add(TEXTS, metadata=[{"row": number} for number in range(5)], ids=[f"row{number}" for number in range(5)])
    with serving(encoder, index) as address:
        yield address
        assert httpx.post(f"{address}/search", json={"text": "the dog"}).status_code == 200


def _until(holds, seconds=60):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def _answers(address):
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{address}/health").status_code == 200
    return False


def _in_work(address):
    page = httpx.get(f"{address}/metrics", headers={"Authorization": "Bearer key"}).text
    found = re.search(r"textcond_requests_in_work (\d+)", page)
    return int(found[1]) if found else 0
