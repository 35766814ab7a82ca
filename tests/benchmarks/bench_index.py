"""Build rate, memory, disk and latency of a PromptIndex beside faiss, LanceDB and Milvus Lite used directly.

    python tests/benchmarks/bench_index.py --prompts prompts.tsv --encoder FOLDER --rows 100000 --work runs/bench-index

Every column of the tab-separated file is a prompt. Rows and queries are different prompts of it, drawn by a seed, with
their real vectors, which are kept in the work folder for the next run. Every engine runs in a process of its own, on
one thread; "ours adds" is what a search takes beside the calls of its own store. Recall is of the ten nearest by exact
cosine; an ANN index is built where our stores build one, with the search effort that they measured.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # read when numpy and torch are loaded

import numpy as np
from rich.console import Console
from rich.table import Table

ENGINES = (
    "faiss Flat",
    "faiss HNSW32",
    "PromptIndex on LanceDB",
    "LanceDB directly",
    "PromptIndex on Milvus Lite",
    "Milvus Lite directly",
)
K, BATCH, RECALL = 10, 1000, 0.98


# -- what is searched ----------------------------------------------------------------------------------------------


def prepare(arguments: argparse.Namespace) -> tuple[Path, float | None]:
    """Return a folder with texts, queries, vectors and the exact answers, and the texts encoded a second if they were.

    Raises:
        ValueError: if the file has too few different prompts.
    """
    folder = arguments.work / f"{arguments.encoder.strip('/').replace('/', '_')}-{arguments.rows}-{arguments.queries}"
    if (folder / "truth.npy").exists():
        return folder, None
    import torch

    from textcond import TextEncoder

    folder.mkdir(parents=True, exist_ok=True)
    with open(arguments.prompts, encoding="utf-8") as lines:
        prompts = list(dict.fromkeys(part for line in lines for part in line.rstrip("\n").split("\t") if part.strip()))
    if len(prompts) < arguments.rows + arguments.queries:
        raise ValueError(f"{arguments.prompts} has {len(prompts):,} different prompts: lower --rows")
    order = np.random.default_rng(0).permutation(len(prompts))[: arguments.rows + arguments.queries]
    texts = [prompts[place] for place in order[: arguments.rows]]
    queries = [prompts[place] for place in order[arguments.rows :]]
    encoder = TextEncoder.from_pretrained(arguments.encoder, dtype=getattr(torch, arguments.dtype))
    start = time.perf_counter()
    vectors = unit(encoder.encode(texts, kind="document", show_progress_bar=True))
    rate = len(texts) / (time.perf_counter() - start)
    asked = unit(encoder.encode(queries, kind="query"))
    (folder / "texts.json").write_text(json.dumps([texts, queries], ensure_ascii=False), encoding="utf-8")
    np.save(folder / "vectors.npy", vectors)
    np.save(folder / "queries.npy", asked)
    np.save(folder / "truth.npy", np.stack([np.sort(vectors @ query)[::-1][:K] for query in asked]))
    return folder, rate


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return rows of length 1."""
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


class Data:
    """What one engine is given."""

    def __init__(self, folder: Path):
        self.texts, self.queries = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
        self._file = folder / "vectors.npy"
        self.asked, self.truth = np.load(folder / "queries.npy"), np.load(folder / "truth.npy")
        self.ids = [str(place) for place in range(len(self.texts))]

    @property
    def vectors(self) -> np.ndarray:
        """All vectors, mapped anew: what was read of an earlier mapping counts as memory no more."""
        return np.load(self._file, mmap_mode="r")

    def recall(self, found: list[list[str]]) -> float:
        """The share of the true ten that was found; rows of equal vectors stand for each other."""
        right, vectors = 0, self.vectors
        for query, smallest, ids in zip(self.asked, self.truth[:, -1], found):
            # stores may keep float16, which moves a cosine by less than this
            right += int((vectors[[int(row_id) for row_id in ids]] @ query >= smallest - 1e-3).sum())
        return right / self.truth.size


# -- the engines ---------------------------------------------------------------------------------------------------


def faiss_index(data: Data, hnsw: bool) -> dict:
    """Search by faiss's exact or graph index."""
    import faiss

    faiss.omp_set_num_threads(1)
    dim = data.vectors.shape[1]
    index = faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT) if hnsw else faiss.IndexFlatIP(dim)
    start = time.perf_counter()
    for at in range(0, len(data.texts), BATCH):
        index.add(np.ascontiguousarray(data.vectors[at : at + BATCH]))
    build = time.perf_counter() - start

    def search(place: int) -> list[str]:
        return [str(row) for row in index.search(data.asked[place : place + 1], K)[1][0]]

    for ef in (16, 32, 64, 128, 256, 512, 1024) if hnsw else ():
        index.hnsw.efSearch = ef
        if data.recall([search(place) for place in range(len(data.queries))]) >= RECALL:
            break
    return {"store_s": build, "optimize_s": 0, "disk": None, "modes": {"dense": timed(search, data)}}


class Precomputed:
    """An encoder whose vectors are there already, so that its time is not measured."""

    name_or_path, dtype = "precomputed", "float32"

    def __init__(self, data: Data):
        self.dim = data.vectors.shape[1]
        self.known = dict(zip(data.queries, data.asked))

    def encode(self, text: str, **options) -> np.ndarray:
        """Return the vector of a query."""
        return self.known[text]

    def weights_hash(self) -> str:
        """Return what stands for the vectors of this benchmark."""
        return "precomputed"


class Timed:
    """A store that sums up the time that is spent in it."""

    def __init__(self, store):
        self.store, self.seconds = store, 0.0

    def __getattr__(self, name):
        method = getattr(self.store, name)
        if not callable(method):
            return method

        def timed_call(*arguments, **options):
            start = time.perf_counter()
            try:
                return method(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - start

        return timed_call


def prompt_index(data: Data, path: Path) -> dict:
    """Search by a PromptIndex, whose encoder is left out."""
    from textcond import PromptIndex

    index = PromptIndex.create(path, Precomputed(data))
    start = time.perf_counter()
    for at in range(0, len(data.texts), BATCH):
        part = slice(at, at + BATCH)
        index.add(data.texts[part], ids=data.ids[part], vectors=np.array(data.vectors[part]))
    build = time.perf_counter() - start
    start = time.perf_counter()
    index.optimize()
    optimize = time.perf_counter() - start
    index.store = clock = Timed(index.store)
    modes = {}
    for mode in ("dense", "lexical", "hybrid"):

        def search(place: int, mode=mode) -> list[str]:
            return [hit.id for hit in index.search(data.queries[place], K, mode=mode, collapse=False)]

        search(0)  # the first search after writing may have to read words
        modes[mode] = timed(search, data, clock, measured=mode == "dense")
    stats = index.store.stats()
    effort = getattr(clock.store, "_ef", None) if stats["ann"] else None
    return {"store_s": build, "optimize_s": optimize, "disk": size(path), "modes": modes, "ann": stats["ann"],
            "effort": effort}  # fmt: skip


def lance(data: Data, path: Path, ann: dict | None) -> dict:
    """Search by LanceDB as its own guide does: a table, full text, and a vector index of the kind that ours has."""
    import lancedb
    import pyarrow as pa
    from lancedb.index import FTS, IvfSq

    dim = data.vectors.shape[1]
    columns = [("id", pa.string()), ("text", pa.string()), ("vector", pa.list_(pa.float32(), dim))]
    table = lancedb.connect(path).create_table("rows", schema=pa.schema(columns))
    start = time.perf_counter()
    for at in range(0, len(data.texts), BATCH):
        part = slice(at, at + BATCH)
        flat = pa.array(np.array(data.vectors[part]).ravel())
        vectors = pa.FixedSizeListArray.from_arrays(flat, dim)
        table.add(pa.table({"id": data.ids[part], "text": data.texts[part], "vector": vectors}))
    build = time.perf_counter() - start
    start = time.perf_counter()
    table.create_index("text", config=FTS())
    if ann:
        table.create_index("vector", config=IvfSq(distance_type="cosine"))
    table.optimize()
    optimize = time.perf_counter() - start

    def dense(place: int, k: int = K) -> list[str]:
        query = table.search(data.asked[place]).distance_type("cosine")
        if ann:
            query = query.nprobes(ann["nprobes"]).refine_factor(ann["refine_factor"])
        return query.select(["id", "text", "_distance"]).limit(k).to_arrow()["id"].to_pylist()

    def lexical(place: int, k: int = K) -> list[str]:
        words = data.queries[place].replace('"', " ")
        found = table.search(words, query_type="fts", fts_columns="text").select(["id", "text", "_score"])
        return found.limit(k).to_arrow()["id"].to_pylist()

    modes = {"dense": timed(dense, data, measured=True), "lexical": timed(lexical, data, measured=False)}
    modes["hybrid"] = timed(lambda place: fused(dense(place, 50), lexical(place, 50)), data, measured=False)
    return {"store_s": build, "optimize_s": optimize, "disk": size(path), "modes": modes, "ann": ann and ann["kind"]}


def milvus(data: Data, path: Path, ann: str | None, effort: int | None) -> dict:
    """Search by Milvus Lite as its own guide does: BM25 by its function, a vector index of the kind that ours has."""
    from pymilvus import DataType, Function, FunctionType, MilvusClient

    client = MilvusClient(str(path))
    schema = MilvusClient.create_schema(auto_id=False)
    schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=64)
    schema.add_field("text", DataType.VARCHAR, max_length=65_535, enable_analyzer=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=data.vectors.shape[1])
    schema.add_field("sparse", DataType.SPARSE_FLOAT_VECTOR)
    schema.add_function(Function("bm25", FunctionType.BM25, ["text"], ["sparse"]))
    indexes = client.prepare_index_params()
    indexes.add_index("sparse", index_type="SPARSE_INVERTED_INDEX", metric_type="BM25")
    parameters = {"M": 16, "efConstruction": 200} if ann else {}
    indexes.add_index("vector", index_type=ann or "FLAT", metric_type="COSINE", params=parameters)
    client.create_collection("rows", schema=schema)
    start = time.perf_counter()
    for at in range(0, len(data.texts), BATCH):
        part = slice(at, at + BATCH)
        rows = zip(data.ids[part], data.texts[part], np.array(data.vectors[part]).tolist())
        client.insert("rows", [{"id": row_id, "text": text, "vector": vector} for row_id, text, vector in rows])
    build = time.perf_counter() - start
    start = time.perf_counter()
    client.flush("rows")
    client.create_index("rows", indexes)
    client.load_collection("rows")
    optimize = time.perf_counter() - start

    def search(query, field: str, k: int, params: dict) -> list[str]:
        found = client.search(
            "rows", [query], anns_field=field, limit=k, output_fields=["text"], search_params={"params": params}
        )
        return [hit["id"] for hit in found[0]]

    def dense(place: int, k: int = K) -> list[str]:
        return search(data.asked[place].tolist(), "vector", k, {"ef": max(effort, k)} if effort else {})

    def lexical(place: int, k: int = K) -> list[str]:
        return search(data.queries[place], "sparse", k, {})

    modes = {"dense": timed(dense, data, measured=True), "lexical": timed(lexical, data, measured=False)}
    modes["hybrid"] = timed(lambda place: fused(dense(place, 50), lexical(place, 50)), data, measured=False)
    client.close()
    return {"store_s": build, "optimize_s": optimize, "disk": size(path), "modes": modes, "ann": ann}


def fused(first: list[str], second: list[str]) -> list[str]:
    """Fuse two rankings by reciprocal ranks."""
    scores: dict[str, float] = {}
    for ranking in (first, second):
        for rank, row_id in enumerate(ranking, start=1):
            scores[row_id] = scores.get(row_id, 0) + 1 / (60 + rank)
    return sorted(scores, key=lambda row_id: -scores[row_id])[:K]


def timed(search, data: Data, clock: Timed | None = None, measured: bool = True) -> dict:
    """Return milliseconds a search, and recall where it is measured."""
    search(0)
    whole, own, found = [], [], []
    for place in range(len(data.queries)):
        inside = clock.seconds if clock else 0.0
        start = time.perf_counter()
        found.append(search(place))
        whole.append(time.perf_counter() - start)
        if clock:
            own.append(whole[-1] - (clock.seconds - inside))
    result = {"p50": 1000 * float(np.median(whole)), "p95": 1000 * float(np.quantile(whole, 0.95))}
    if own:
        result["adds"] = 1000 * float(np.median(own))
    if measured:
        result["recall"] = data.recall(found)
    return result


def size(path: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def run(engine: str, folder: Path, earlier: dict) -> dict:
    """Build and search by one engine, in this process."""
    data = Data(folder)
    path = folder / (engine.replace(" ", "-").lower() + (".db" if "Milvus" in engine else ""))
    shutil.rmtree(path, ignore_errors=True)
    if engine.startswith("faiss"):
        result = faiss_index(data, "HNSW" in engine)
    elif engine.startswith("PromptIndex"):
        result = prompt_index(data, path)
    else:
        ours = earlier.get(f"PromptIndex on {engine.removesuffix(' directly')}", {})
        direct = lance if engine.startswith("LanceDB") else milvus
        result = direct(data, path, ours.get("ann"), *([ours.get("effort")] if direct is milvus else []))
    shutil.rmtree(path, ignore_errors=True)
    # not of getrusage, which begins with what the parent had
    status = Path("/proc/self/status").read_text()
    return result | {"memory": 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, help="a file of prompts, tab-separated")
    parser.add_argument("--encoder", required=True, help="folder or hub id")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the encoder")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--work", type=Path, default=Path("runs/bench-index"), help="vectors are kept here")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--child", choices=ENGINES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder, rate = prepare(arguments)
    if arguments.child:
        print(json.dumps(run(arguments.child, folder, json.loads(sys.stdin.read()))))
        return

    results: dict[str, dict] = {}
    for engine in arguments.engines:
        print(f"{engine} ...", file=sys.stderr, flush=True)
        command = [sys.executable, *sys.argv, "--child", engine]
        finished = subprocess.run(command, input=json.dumps(results), capture_output=True, text=True, check=False)
        if finished.returncode:
            sys.exit(f"{engine} failed:\n{finished.stderr[-2000:]}")
        results[engine] = json.loads(finished.stdout.splitlines()[-1])

    title = f"{arguments.rows:,} prompts, {arguments.queries} queries, top {K}, one thread"
    title += f", {arguments.encoder} in {arguments.dtype}"
    table = Table(title=title + (f"; encoding took {arguments.rows / rate:.0f} s, {rate:,.0f} texts/s" if rate else ""))
    for column in ("engine", "rows/s", "optimize, s", "disk, MB", "memory, MB", "index", "recall", "search",
                   "p50, ms", "p95, ms", "ours adds, ms"):  # fmt: skip
        table.add_column(column, justify="left" if column in ("engine", "index", "search") else "right")
    for engine, result in results.items():
        ann = result.get("ann")
        head = [
            engine, f"{arguments.rows / result['store_s']:,.0f}", f"{result['optimize_s']:.1f}",
            f"{result['disk'] / 1e6:.0f}" if result["disk"] else "", f"{result['memory'] / 1e6:.0f}",
            str(ann["kind"] if isinstance(ann, dict) else ann or "exact") if "ann" in result else "",
        ]  # fmt: skip
        for mode, times in result["modes"].items():
            recall = f"{times['recall']:.3f}" if "recall" in times else ""
            adds = f"{times['adds']:.2f}" if "adds" in times else ""
            table.add_row(*head, recall, mode, f"{times['p50']:.2f}", f"{times['p95']:.2f}", adds)
            head = [""] * len(head)
        table.add_section()
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
