"""`textcond serve`: from the command line to a server that stops when it is told to."""

from __future__ import annotations

import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from textcond.apps.metadata import MULTILINGUAL
from textcond.apps.quiet import quiet_libraries

if TYPE_CHECKING:
    from textcond import PromptIndex, TextEncoder

STOP_SECONDS = 60  # what is in work may take after SIGTERM


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets the whole network in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any free one.")] = 8000,
    encoder: Annotated[
        str | None,
        typer.Option("--encoder", "-e", metavar="FOLDER|ID", help="Text encoder; that of the index if left out."),
    ] = None,
    index: Annotated[
        str | None,
        typer.Option(
            "--index",
            "-i",
            metavar="FOLDER|FILE|URL",
            help="Prompt index to search; that of the reference model if neither this nor --encoder is given.",
        ),
    ] = None,
    writable: Annotated[bool, typer.Option("--writable", help="Let clients add rows and delete them.")] = False,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="TEXTCOND_API_KEY",
            help="What clients must send as Authorization: Bearer KEY; an option shows in `ps`, the variable does not.",
        ),
    ] = None,
    queue: Annotated[
        int, typer.Option(min=1, help="Requests that may wait or be worked on; more are told to come back (503).")
    ] = 256,
    batch_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens encoded together; what suits the device if left out, 1 for no batches."),
    ] = None,
    batch_wait: Annotated[
        float, typer.Option(min=0, max=1000, help="Milliseconds that a batch waits for others to join.")
    ] = 2.0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps ...; a GPU if there is one.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; the index's, or what suits, if left out.")
    ] = None,
) -> None:
    """Answer for embeddings (as OpenAI's API) and searches over HTTP. Ctrl-C or SIGTERM finishes what is in work."""
    if api_key is not None and not api_key.strip():
        raise ValueError("the API key is empty: give TEXTCOND_API_KEY a value, or unset it to let everybody in")
    if writable and index is None:
        raise ValueError("--writable needs an index of your own to write to: pass --index")
    listener = _bind(host, port)  # before anything slow, so that a port in use is told at once
    if api_key is None and not _is_loopback(listener):
        _note(f"everybody who reaches {host} can use this server: set TEXTCOND_API_KEY to ask for a key")
    _note("loading the encoder")
    quiet_libraries()
    import uvicorn

    from .app import create_app

    text_encoder, opened = _load(encoder, index, device, dtype)
    app = create_app(
        text_encoder,
        opened,
        model=_model_name(encoder or (MULTILINGUAL if index is None else text_encoder.name_or_path)),
        writable=writable,
        api_key=api_key,
        queue=queue,
        batch_tokens=batch_tokens,
        batch_wait=batch_wait / 1000,
    )
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="error",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=STOP_SECONDS,
        )
    )
    # uvicorn raises the signal again when all is done; being told to stop is no failure
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{listener.getsockname()[1]}", flush=True)
    try:
        server.run(sockets=[listener])
    finally:
        if opened is not None:
            opened.store.close()


def _load(
    encoder: str | None, index: str | None, device: str | None, dtype: str | None
) -> tuple[TextEncoder, PromptIndex | None]:
    from textcond import PromptIndex
    from textcond.apps.finder import open_index
    from textcond.apps.loading import load_text_encoder, torch_device, torch_dtype

    if encoder is not None:
        loaded = load_text_encoder(encoder, device=device, dtype=dtype)
        return loaded, None if index is None else PromptIndex.open(index, loaded)
    place = torch_device(device)
    opened = open_index(index)
    own = opened.encoder.to(place)
    return own if dtype is None else own.to(torch_dtype(dtype, place)), opened


def _model_name(encoder: str | None) -> str:
    """What clients call the encoder: a hub id as it is, of a folder its own name and no path of this machine."""
    if encoder is None:  # an encoder that was made in memory
        return "textcond"
    folder = Path(encoder).expanduser()
    return folder.resolve().name if folder.is_dir() else encoder


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port} ({error.strerror}): pass another --host or --port") from error
    return listener


def _is_loopback(listener: socket.socket) -> bool:
    address = listener.getsockname()[0]
    return address == "::1" or address.startswith("127.")


def _note(text: str) -> None:
    print(f"textcond: {text}", file=sys.stderr, flush=True)
