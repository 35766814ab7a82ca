"""How fast and how frugal the studio is: start, first preview, neighbours while typing, memory, many users.

    python tests/benchmarks/bench_studio.py --pictures 200 --users 8

The server runs as `textcond studio` with the reference model, on this machine's CPU. There is no peer: no other page
draws and finds with one encoder.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from studio_page import SETTINGS, Page

from textcond.apps.metadata import MULTILINGUAL

WORDS = ("red", "blue", "apple", "fox", "cat", "noto", "blob", "style", "on", "green", "flat", "heart", "star")


def memory(pid: int) -> float:
    """Resident megabytes of a process."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


def draw(page: Page, session: str, **changed) -> list[tuple[float, dict]]:
    """Press Generate; every message with its second."""
    began = time.monotonic()
    settings = SETTINGS | {"prompt": "red apple, noto style", "steps": 20, "encoder": MULTILINGUAL} | changed
    return [
        (time.monotonic() - began, message)
        for message in page.messages("run", "", False, 1, None, *settings.values(), session=session)
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=200, help="for the growth of memory")
    parser.add_argument("--users", type=int, default=8, help="at once")
    parser.add_argument("--queries", type=int, default=100, help="while typing")
    options = parser.parse_args()
    table = Table("what", "value", title="the studio, reference model, 20 steps")

    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        command = [sys.executable, "-m", "textcond.apps.cli", "studio", "--pictures", folder]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            page = Page(server.stdout.readline().split()[2])
            table.add_row("from the command to the page", f"{time.monotonic() - began:.1f} s")
            page.fire("find", "fox", MULTILINGUAL, "hybrid", session="first")
            table.add_row("from the command to the first neighbours", f"{time.monotonic() - began:.1f} s")
            draw(page, "first")
            table.add_row("from the command to the first picture", f"{time.monotonic() - began:.1f} s")

            steps = [second for second, message in draw(page, "first") if "step-" in json.dumps(message)]
            table.add_row("prompt to first preview", f"{steps[0]:.2f} s")
            rng, took = np.random.default_rng(0), []
            for _ in range(options.queries):
                text = " ".join(rng.choice(WORDS, 4))
                began = time.monotonic()
                page.fire("find", text, MULTILINGUAL, "hybrid", session="typing")
                took.append(time.monotonic() - began)
            table.add_row("neighbours while typing, p50", f"{1000 * np.percentile(took, 50):.0f} ms")
            table.add_row("neighbours while typing, p95", f"{1000 * np.percentile(took, 95):.0f} ms")

            before = None
            for number in range(options.pictures):
                draw(page, "many", seed=number, steps=4)
                if number == options.pictures // 4:
                    before = memory(server.pid)
            table.add_row(f"memory after {options.pictures // 4} pictures", f"{before:.0f} MB")
            table.add_row(f"memory after {options.pictures} pictures", f"{memory(server.pid):.0f} MB")

            ends: list[float] = []
            began = time.monotonic()

            def user(number: int) -> None:
                *_, (_, end) = draw(page, f"user-{number}", seed=number)
                assert end["success"], end
                ends.append(time.monotonic() - began)

            users = [threading.Thread(target=user, args=(number,)) for number in range(options.users)]
            for thread in users:
                thread.start()
            for thread in users:
                thread.join()
            table.add_row(f"{options.users} users at once, the first has a picture", f"{min(ends):.1f} s")
            table.add_row(f"{options.users} users at once, all have one ({len(ends)})", f"{max(ends):.1f} s")
        finally:
            server.terminate()
            server.wait()
    Console().print(table)


if __name__ == "__main__":
    main()
