"""The page, and what is passed on between a client and the engine."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from minifoundation.commands import serve as command
from minifoundation.config import ServeOptions
from minifoundation.errors import UserError
from tests.browser import CHROMIUM, MISSING, page

for name in ("starlette", "httpx", "uvicorn", "fastapi", "openai"):
    pytest.importorskip(name)


class Engine(BaseHTTPRequestHandler):
    """Answers a completion with what it was asked, in two parts, of which the second waits to be let go."""

    let_go = threading.Event()

    def do_POST(self) -> None:
        with suppress(ConnectionError):  # who asked may leave before the end
            self.answer()

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if b"wrong" in body:
            self.send_response(400)
            self.send_header("content-type", "application/json")
            self.end_headers()
            self.wfile.write(b'{"detail":"no such model"}')
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        if b"choices" in body:
            self.complete(json.loads(body))
            return
        self.wfile.write(b"data: " + body + b"\n\n")
        self.wfile.flush()
        self.let_go.wait(10)
        self.wfile.write(b"data: [DONE]\n\n")

    def complete(self, asked: dict[str, Any]) -> None:
        """Go on from the last line of the prompt as a server does, a word at a time."""
        assert (asked["model"], asked["stream"], asked["max_tokens"]) == ('my "<model>"', True, 7)
        for text in (f" after {asked['prompt'].splitlines()[-1]!r}", " came this."):
            self.wfile.write(f"data: {json.dumps({'choices': [{'index': 0, 'text': text}]})}\n\n".encode())
            self.wfile.flush()
            self.let_go.wait(10)
        if "fault" in asked["prompt"]:
            self.wfile.write(b'data: {"error": "it said "no" to that"}\n\n')  # as transformers writes it
        elif "break" not in asked["prompt"]:
            self.wfile.write(b'data: {"choices": [{"text": "", "finish_reason": "length"}]}\n\n')

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def engine() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Engine) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture
def address(engine: str) -> Iterator[str]:
    with served(engine, "127.0.0.1", free_port()) as address:
        yield address


@contextmanager
def served(engine: str, host: str, port: int) -> Iterator[str]:
    """Give the address of the page before ``engine``, as ``serve`` prints it."""
    import uvicorn

    listening = command._listening(host, port)
    server = uvicorn.Server(uvicorn.Config(command.app(engine, 'my "<model>"'), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://{command.authority(host, port)}"
    server.should_exit = True
    thread.join(5)
    listening.close()


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as one:
        one.bind((host, 0))
        return int(one.getsockname()[1])


def test_the_page_names_the_model_and_asks_for_completions(address: str) -> None:
    with urllib.request.urlopen(address) as answer:
        page = answer.read().decode()
    assert "<title>my &quot;&lt;model&gt;&quot;</title>" in page and "{{" not in page
    assert 'fetch("v1/completions"' in page and "stream: true" in page
    assert re.findall(r"(?:src|href)=", page) == [], "nothing is fetched from elsewhere"
    with urllib.request.urlopen(f"{address}/v1/models") as answer:
        assert [model["id"] for model in json.load(answer)["data"]] == ['my "<model>"']


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_the_address_of_a_host_of_ipv6_is_one_to_type(engine: str) -> None:
    try:
        port = free_port("::1")
    except OSError as error:
        pytest.skip(f"no IPv6 here ({error})")
    with served(engine, "::1", port) as address:
        assert address == f"http://[::1]:{port}"
        with urllib.request.urlopen(address) as answer:
            assert answer.status == 200
        with pytest.raises(UserError, match=rf"\[::1\]:{port} cannot be listened on"):
            command._listening("::1", port)


def test_answers_come_as_the_engine_gives_them(address: str) -> None:
    import httpx

    asked = {"prompt": "To be", "stream": True}
    Engine.let_go.clear()
    with httpx.stream("POST", f"{address}/v1/completions", json=asked, timeout=10) as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        parts = answer.iter_text()
        assert json.loads(next(parts).removeprefix("data: ")) == asked, "the first part is there before the second is made"
        Engine.let_go.set()
        assert "".join(parts) == "data: [DONE]\n\n"
    refused = httpx.post(f"{address}/v1/completions", json={"prompt": "wrong"})
    assert (refused.status_code, refused.json()) == (400, {"detail": "no such model"})
    assert httpx.get(f"{address}/load_model").status_code == 404, "only completions are passed on"


def test_an_engine_that_has_ended_is_said_in_words(address: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    async def refused(*_: Any, **__: Any) -> None:
        raise httpx.ReadError("")

    monkeypatch.setattr(httpx.AsyncClient, "send", refused)
    with urllib.request.urlopen(address) as answer:
        assert answer.status == 200, "the page is there all the same"
    request = urllib.request.Request(f"{address}/v1/completions", b"{}", {"content-type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as failed:
        urllib.request.urlopen(request)
    assert failed.value.code == 502
    assert json.load(failed.value) == {"error": {"message": "The engine does not answer; start serve again."}}


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
@pytest.mark.parametrize("phone", [False, True])
def test_a_person_writes_with_it_in_a_browser(address: str, phone: bool, tmp_path: Path) -> None:
    Engine.let_go.clear()
    with page(tmp_path) as shown:
        shown.open(address, width=390 if phone else 1200, height=844, phone=phone)
        inside = "[...document.querySelectorAll('body *')].every((e) => e.getBoundingClientRect().right <= innerWidth)"
        assert shown.value(f"document.documentElement.scrollWidth <= innerWidth && {inside}"), "nothing lies beside the window"
        assert shown.value("document.querySelector('#go').getBoundingClientRect().height >= 44"), "large enough for a finger"
        shown.type("#tokens", "7")
        shown.type("#text", "choices\nTo be")
        shown.click("#go")
        text, said = "document.querySelector('#text').value", "document.querySelector('#said').textContent"
        shown.until(f"{text}.endsWith(`after 'To be'`)")
        assert shown.value("document.querySelector('#go').textContent") == "Stop", "the first part is shown before the second is made"
        Engine.let_go.set()
        shown.until("document.querySelector('#go').textContent === 'Continue'")
        assert shown.value(text) == "choices\nTo be after 'To be' came this." and shown.value(said) == ""

        for prompt, words in (
            ("wrong", "no such model"),
            ("choices fault", '{"error": "it said "no" to that"}'),
            ("choices break", "The answer broke off."),
        ):
            shown.type("#text", prompt)
            shown.click("#go")
            shown.until(f"{said} === {json.dumps(words)}")
            assert shown.value(text).startswith(prompt), "what was written stays"
        shown.screenshot(tmp_path / "page.png")

        Engine.let_go.clear()
        shown.type("#text", "choices on and on")
        shown.click("#go")
        shown.until(f"{text}.includes('after')")
        shown.click("#go")
        shown.until("document.querySelector('#go').textContent === 'Continue'")
        assert shown.value(said) == "", "stopped by hand is no error"
        shown.value("document.querySelector('#tokens').value = ''")
        shown.click("#go")
        assert shown.value("document.activeElement.id") == "tokens", "the browser asks for a number"
    Engine.let_go.set()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
def test_a_page_whose_server_has_gone_says_so(engine: str, address: str, tmp_path: Path) -> None:
    with page(tmp_path) as shown:
        shown.open(address, width=390, height=844, phone=True)
        shown.call("Network.enable")
        shown.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1)
        shown.click("#go")
        shown.until("document.querySelector('#said').textContent === 'The server does not answer; see whether serve still runs.'")


def test_bad_input(final: Callable[..., Path], tmp_path: Path) -> None:
    def serve(model: Path, **settings: Any) -> None:
        command.serve(ServeOptions.model_validate({"model": model, "port": free_port()} | settings))

    with pytest.raises(UserError, match="no such file or folder"):
        serve(tmp_path / "none")
    with pytest.raises(UserError, match=r"holds no config\.json"):
        serve(tmp_path)
    with pytest.raises(UserError, match=r"run holds no config\.json; give .*run/final\.pth, or the folder"):
        serve(final().parent)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port} cannot be listened on"):
            serve(final(), port=port)
    with pytest.raises(UserError, match="--host: is empty; give an address"):
        serve(final(), host="")
    if find_spec("vllm") is None:
        with pytest.raises(UserError, match="vllm is not installed"):
            serve(final(), engine="vllm")


def test_a_temperature_is_sampled_with_and_the_folder_stays_as_it_is(final: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from minifoundation.commands.export_hf import export_hf
    from minifoundation.config import ExportOptions

    ckpt, hf = final(), tmp_path / "my model"
    export_hf(ExportOptions(ckpt=ckpt, out_dir=hf))
    before = {file.name: file.read_bytes() for file in hf.iterdir()}
    for model in (ckpt, hf):
        with command._folder(model, "transformers") as folder:
            settings = AutoModelForCausalLM.from_pretrained(folder).generation_config
            assert (settings.do_sample, settings.top_k, settings.eos_token_id) == (True, 0, 2)
            assert folder.name == ("run" if model is ckpt else "my model")
    (hf / "generation_config.json").unlink()
    with command._folder(hf, "transformers") as folder:
        assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == 2
    (hf / "generation_config.json").write_bytes(before["generation_config.json"])
    assert before == {file.name: file.read_bytes() for file in hf.iterdir()}
    (hf / "generation_config.json").write_text("[]")
    with (
        pytest.raises(UserError, match=r"my model/generation_config\.json: is damaged: not a JSON object"),
        command._folder(hf, "transformers"),
    ):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_checkpoint_is_served_until_it_is_told_to_stop(how: signal.Signals, final: Callable[..., Path], tmp_path: Path) -> None:
    """With transformers' own server; the greedy continuation is that of the exported folder."""
    import httpx

    from minifoundation.commands.export_hf import export_hf
    from minifoundation.config import ExportOptions

    ckpt, port = final(init_std=0.15), free_port()
    line = [sys.executable, "-m", "src.cli", "serve", "--model", str(ckpt), "--port", str(port), "--engine", "transformers"]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stdout is not None
        assert f"http://127.0.0.1:{port}" in server.stdout.readline()
        asked = {"model": "run", "prompt": "To be", "max_tokens": 8, "temperature": 0}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=asked, timeout=60).json()
        sampled = [httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=asked | {"temperature": 1}, timeout=60).json() for _ in "ab"]
        server.send_signal(how)
        assert server.wait(30) == 0
    finally:
        server.kill()
        server.communicate()
    assert answer["usage"]["completion_tokens"] == 8
    assert len({one["choices"][0]["text"] for one in (answer, *sampled)}) == 3, "not greedy"
    export_hf(ExportOptions(ckpt=ckpt, out_dir=tmp_path / "hf"))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="float32")
    prompt = tokenizer("To be", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert answer["choices"][0]["text"] == tokenizer.decode(ids, skip_special_tokens=True)
