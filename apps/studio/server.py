"""Serving the page: the port, who may do what, and what is loaded while the first visitor looks around."""

from __future__ import annotations

import errno
import importlib.util
import os
import socket
import sys
import threading
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from textcond.apps.engine import Engine
from textcond.apps.loading import find_pipeline
from textcond.apps.metadata import REFERENCE
from textcond.apps.quiet import quiet_libraries

from .keys import SCRIPT
from .page import build
from .shared import MAX_UPLOAD, Studio, log
from .theme import CSS, THEME

if TYPE_CHECKING:
    from starlette.middleware import Middleware

FIRST_PORT, LAST_PORT = 7860, 7959
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    host: str = "127.0.0.1",
    port: int | None = None,
    pipeline: str = REFERENCE,
    index: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    *,
    pictures: str | Path | None = None,
    auth: str | None = None,
    root_path: str | None = None,
    mcp: bool = False,
) -> None:
    """Serve the studio until Ctrl-C. The page is up before the model is: that loads meanwhile.

    Args:
        host, port: where to listen; None is the first free port from 7860.
        pipeline, index, device, dtype: as for `Engine`.
        pictures: folder that keeps what visitors make; None is the user's own.
        auth: "NAME:PASSWORD" that visitors must know.
        root_path: path under which a proxy serves it, such as "/studio".
        mcp: whether the API is offered as tools over MCP too.

    Visitors may load models and write into the index if they know the password, or if nobody else can reach the page:
    on loopback, without a proxy at `root_path`.

    Raises:
        FileNotFoundError, ValueError: the pipeline or the index does not exist, or the password is malformed.
        ImportError: MCP is not installed.
        OSError: no port is free.
    """
    if pipeline != REFERENCE:
        find_pipeline(pipeline)
    if index is not None and "://" not in str(index) and not Path(index).exists():
        raise FileNotFoundError(f"there is no prompt index {index}: check the path")
    if mcp and importlib.util.find_spec("mcp") is None:
        raise ImportError("the tools over MCP need the package mcp: pip install 'textcond[mcp]'")
    known = _credentials(auth)
    port = free_port(host, port)
    local = host in LOOPBACK
    folder = pictures_folder(pictures)
    studio = Studio(
        engine=Engine(pipeline, index, device, dtype, own_index=folder / "index"),
        folder=folder / "served",
        encoders=nearby_encoders(Path.cwd()),
        # behind a proxy, who reaches it is not who sits here
        trusted=(local and not root_path) or known is not None,
    )
    studio.forget_old()
    page = build(studio)
    _, address, _ = page.queue(max_size=128, default_concurrency_limit=4).launch(
        server_name=host,
        server_port=port,
        auth=known,
        root_path=root_path,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        theme=THEME,
        css=CSS,
        js=SCRIPT,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=mcp,
        app_kwargs={"middleware": _middleware(local and not root_path)},
        max_file_size=MAX_UPLOAD,
        max_threads=160,
    )
    threading.Thread(target=_warm_up, args=(studio.engine,), daemon=True).start()
    print(f"textcond studio: {address}  (Ctrl-C stops it)", flush=True)
    if not local:
        who = "anyone who knows the password" if known else "anyone who reaches it"
        print(f"textcond: it listens on {host}: {who} can use it", file=sys.stderr)
    try:
        page.server.thread.join()
    finally:
        page.close(verbose=False)


def pictures_folder(chosen: str | Path | None = None) -> Path:
    """Where pictures are kept: `chosen`, or the user's folder for caches."""
    if chosen is None:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        chosen = Path(caches) / "textcond" / "studio"
    folder = Path(chosen).expanduser().resolve()
    (folder / "served").mkdir(parents=True, exist_ok=True)
    return folder


def _middleware(local: bool) -> list[Middleware]:
    """On loopback, refuse what a page elsewhere asks for under a name of its own that leads here."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    names = ["127.0.0.1", "localhost", "["]  # starlette cuts "[::1]:7860" at the first colon
    return [Middleware(TrustedHostMiddleware, allowed_hosts=names)] if local else []


def _credentials(auth: str | None) -> tuple[str, str] | None:
    if auth is None:
        return None
    name, separator, password = auth.partition(":")
    if not (name and separator and password):
        raise ValueError(f"--auth {auth!r} is no name and password: pass NAME:PASSWORD")
    return name, password


def nearby_encoders(folder: Path) -> list[str]:
    """Conditioning encoders in `folder` and two levels below, as paths from it."""
    found = []
    for config in sorted(chain(folder.glob("*/config.json"), folder.glob("*/*/config.json"))):
        try:
            if '"ConditioningEncoder' in config.read_text(encoding="utf-8"):
                found.append(str(config.parent.relative_to(folder)))
        except (OSError, UnicodeDecodeError):
            continue
    return found


def free_port(host: str, port: int | None = None) -> int:
    """`port` if it is free, or without one the first free port from 7860 to 7959.

    Raises:
        OSError: it is taken, none is free, or `host` is no address of this machine.
    """
    for candidate in [port] if port else range(FIRST_PORT, LAST_PORT + 1):
        try:
            family, *_, address = socket.getaddrinfo(host, candidate, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                return candidate
        except PermissionError as error:
            raise PermissionError(f"port {candidate} is for the administrator only: choose one from 1024 up") from error
        except socket.gaierror as error:
            raise OSError(f"{host} is no address of this machine: pass --host 127.0.0.1, or 0.0.0.0") from error
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise OSError(f"cannot listen on {host} ({error.strerror}): pass --host 127.0.0.1") from error
    if port:
        raise OSError(f"port {port} on {host} is taken: pass another --port, or leave it out for the first free one")
    raise OSError(f"no port of {FIRST_PORT} to {LAST_PORT} on {host} is free: stop what listens there, or pass --port")


def _warm_up(engine: Engine) -> None:
    for load in (quiet_libraries, engine.finder, engine.warm_up):
        try:
            load()
        except Exception as error:  # the first request that needs it meets it again, and tells it on the page
            log(error)
