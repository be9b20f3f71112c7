"""``serve``: OpenAI's completions endpoint and a page to type into, on vLLM where it is installed, else on transformers' own server.

The engine is a process of its own that listens on this machine alone; in front of it is a proxy that adds the page.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.error import URLError
from urllib.request import urlopen

from minifoundation.config import ServeOptions
from minifoundation.errors import UserError
from minifoundation.evaluate.folder import check_folder, is_checkpoint
from minifoundation.hf_folder import read_config, read_object
from minifoundation.packages import installed

if TYPE_CHECKING:
    from starlette.applications import Starlette

PAGE = Path(__file__).with_name("serve.html")
NEEDED = ("transformers", "fastapi", "uvicorn", "openai", "httpx")
HERE = "127.0.0.1"
TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
PASSED_ON = ("content-type", "x-request-id")
"""Headers of the engine's answers that the proxy passes on."""

Engine = Literal["vllm", "transformers"]


def serve(options: ServeOptions) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Raises:
        UserError: no such model, the packages are not installed, the port is taken, or the engine does not start.
    """
    if missing := [name for name in NEEDED if not installed(name)]:
        raise UserError("serve", f"{missing[0]} is not installed", "pip install -e '.[serve]'")
    import uvicorn

    if not options.model.exists():
        raise UserError("--model", f"{options.model}: no such file or folder", "give final.pth, a step_ folder or an exported folder")
    engine: Engine = ("vllm" if installed("vllm") else "transformers") if options.engine == "auto" else options.engine
    if engine == "vllm" and not installed("vllm"):
        raise UserError("--engine", "vllm is not installed", "pip install vllm, or leave --engine out")
    host = options.host.removeprefix("[").removesuffix("]")  # as in a URL
    if not host:  # to a socket that means every address
        raise UserError("--host", "is empty", "give an address of this machine (0.0.0.0: all of them), or leave it out")
    listening = _listening(host, options.port)
    with listening, _folder(options.model, engine) as folder, _started(engine, folder) as port:
        print(f"{engine} serves {folder.name}: http://{authority(host, options.port)} (a page), /v1/completions (OpenAI's); Ctrl-C ends it")
        server = uvicorn.Server(uvicorn.Config(app(f"http://{HERE}:{port}", folder.name), log_level="warning"))
        with suppress(KeyboardInterrupt):  # uvicorn raises the signal again when it has ended
            server.run(sockets=[listening])


def _listening(host: str, port: int) -> socket.socket:
    """Return a socket that is listened on before the engine takes its time to start; who calls early waits."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen()
    except OSError as error:
        listening.close()
        raise UserError(
            "--port", f"{authority(host, port)} cannot be listened on ({error.strerror})", "give another --port or --host"
        ) from None
    return listening


def authority(host: str, port: int) -> str:
    """Return host and port as a URL has them: an IPv6 address in brackets (RFC 3986, 3.2.2)."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@contextmanager
def _folder(model: Path, engine: Engine) -> Iterator[Path]:
    """Give the model as a folder of Hugging Face: itself, one of links to its files, or one of a checkpoint, as it would be exported."""
    if not is_checkpoint(model):
        check_folder(model, "--model")
        if engine == "vllm":
            yield model.resolve()
            return
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / model.resolve().name
            folder.mkdir()
            for file in model.resolve().iterdir():
                (folder / file.name).symlink_to(file)
            _let_sample(folder)
            yield folder
        return
    import torch

    from minifoundation.checkpoint import load_checkpoint
    from minifoundation.commands.export_hf import native_tokenizer
    from minifoundation.export.tokenizer import write_tokenizer
    from minifoundation.export.weights import write_model

    checkpoint = load_checkpoint(model)
    config = checkpoint.config.model
    with tempfile.TemporaryDirectory() as name, native_tokenizer(checkpoint) as tokenizer:
        folder = Path(name) / (model.resolve().parent.name or model.stem)
        write_tokenizer(tokenizer, folder, max_seq_len=config.max_seq_len)
        write_model(config, checkpoint.model, folder, torch.bfloat16, tokenizer.special)
        _let_sample(folder)
        yield folder


def _let_sample(folder: Path) -> None:
    """Have requests with a temperature sampled: transformers' server does that only where the model's own settings say so.

    Raises:
        UserError: they are damaged.
    """
    path = folder / "generation_config.json"
    settings = {name: value for name, value in read_config(folder).items() if name in TOKEN_IDS}
    if path.is_file():
        settings = read_object(path.resolve())  # it can be a link to the user's file
        path.unlink()
    path.write_text(json.dumps({"top_k": 0, **settings, "do_sample": True}), encoding="utf-8")


@contextmanager
def _started(engine: Engine, folder: Path) -> Iterator[int]:
    """Give the port on which the engine answers; leaving the context ends it."""
    with socket.socket() as free:
        free.bind((HERE, 0))
        port = free.getsockname()[1]
    import torch

    # Both call a model as it was named to them, so that requests can name it by its folder's name.
    where = ["--host", HERE, "--port", str(port)]
    match engine:
        case "vllm":
            command = ["-m", "vllm.entrypoints.cli.main", "serve", folder.name, *where]
        case "transformers":
            dtype = [] if torch.cuda.is_available() else ["--dtype", "float32"]
            command = ["-m", "transformers.cli.transformers", "serve", folder.name, *where, *dtype]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([sys.executable, *command], cwd=folder.parent, stdout=log, stderr=subprocess.STDOUT)
        try:
            while not _answers(port):
                if process.poll() is not None:
                    log.seek(0)
                    last = next((line for line in reversed(log.read().splitlines()) if line.strip()), f"exit code {process.returncode}")
                    raise UserError(engine, f"did not start ({last.strip()})", "fix that, or choose the other --engine")
                time.sleep(0.2)
            yield port
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(port: int) -> bool:
    try:
        with urlopen(f"http://{HERE}:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


def app(engine: str, model: str) -> Starlette:
    """Return the page at ``/``, the one model at ``/v1/models``, and the engine's answers at ``/v1/completions``, passed on as they come.

    Args:
        engine: its address.
        model: the name that requests give.
    """
    import httpx
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    # Each request has a connection of its own: the engine closes one after a fault, and that would fail the request after it.
    client = httpx.AsyncClient(base_url=engine, timeout=None, limits=httpx.Limits(max_keepalive_connections=0))
    page = PAGE.read_text(encoding="utf-8").replace("{{ model }}", escape(model))

    async def shown(_request: Request) -> Response:
        return HTMLResponse(page)

    async def listed(_request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": model, "object": "model"}]})

    async def passed_on(request: Request) -> Response:
        headers = {"content-type": request.headers.get("content-type", "application/json")}
        call = client.build_request("POST", request.url.path, content=await request.body(), headers=headers)
        try:
            answer = await client.send(call, stream=True)
        except httpx.TransportError:
            return JSONResponse({"error": {"message": "The engine does not answer; start serve again."}}, 502)

        async def body() -> AsyncIterator[bytes]:
            try:
                async for part in answer.aiter_raw():
                    yield part
            finally:  # also when the browser has gone: then the engine stops generating
                await answer.aclose()

        return StreamingResponse(body(), answer.status_code, {name: answer.headers[name] for name in PASSED_ON if name in answer.headers})

    @asynccontextmanager
    async def closing(_app: Any) -> AsyncIterator[None]:
        yield
        await client.aclose()

    routes = [Route("/", shown), Route("/v1/models", listed), Route("/v1/completions", passed_on, methods=["POST"])]
    return Starlette(routes=routes, lifespan=closing)
