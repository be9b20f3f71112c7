"""The command as it is typed, with what it prints."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from minifoundation.cli import main
from minifoundation.data import prepare
from minifoundation.data.shards import Shards
from tests.commands.conftest import EXAMPLE

Capture = pytest.CaptureFixture[str]
# A shell that starts its jobs in the background has them ignore Ctrl-C, which a child inherits.
PROGRAM = """import signal, sys
from minifoundation.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main(sys.argv[1:]))"""
COMMAND = [sys.executable, "-c", PROGRAM, "prepare"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes of Shakespeare, a line of JSON each, and two rows that are none."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = EXAMPLE.read_text(encoding="utf-8")[:200_000].split("\n\n")
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in [*texts, None, None]))
    return folder


def test_a_given_tokenizer_is_used_where_it_lies_and_one_that_is_there_is_told(corpus: Path, tmp_path: Path, capsys: Capture) -> None:
    line = ["prepare", "--data", str(corpus), "--data.shards_dir", str(tmp_path / "shards"), "--tokenizer.vocab_size", "512"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert main([*line, "--tokenizer_out", str(first)]) == 0
    assert "is there already" not in capsys.readouterr().out
    assert main([*line, "--tokenizer_out", str(first)]) == 0
    assert f"tokenizer: {first / 'tokenizer.model'} is there already, and is used" in capsys.readouterr().out
    assert main([*line, "--tokenizer_out", str(second), "--tokenizer", str(first / "tokenizer.model")]) == 0
    assert f"tokenizer {first / 'tokenizer.model'}" in capsys.readouterr().out and not second.exists()


def test_a_mistake_in_the_last_source_of_a_mixture_is_told_before_work_on_the_first(corpus: Path, tmp_path: Path, capsys: Capture) -> None:
    outputs = [
        "--data.shards_dir",
        str(tmp_path / "shards"),
        "--tokenizer_out",
        str(tmp_path / "tokenizer"),
        "--tokenizer.vocab_size",
        "512",
    ]
    assert main(["prepare", "--data.mix", f"{corpus}=0.5,{corpus}/none=0.5", *outputs]) == 2
    assert f"'{corpus}/none' is neither a known corpus nor a path" in capsys.readouterr().err and not list(tmp_path.iterdir())
    twice = f"{corpus}=0.5,{corpus}/../{corpus.name}/=0.5"
    for mix, text in (
        (twice, f"{corpus} and {corpus}/../{corpus.name}/"),
        ("fineweb=1,HuggingFaceFW/fineweb:sample-10BT=1", "fineweb and "),
    ):
        assert main(["prepare", "--data.mix", mix, *outputs]) == 2
        assert f"data.mix: {text}" in (err := capsys.readouterr().err) and "are the same text; name it once" in err
    other = tmp_path / "other.txt"
    other.write_text("Another text. " * 50)
    assert main(["prepare", "--data", str(other), *outputs]) == 0
    (before,) = (tmp_path / "shards").iterdir()
    assert main(["prepare", "--data.mix", f"{corpus}=0.5,{other}=0.5", "--data.held_out", "0.1", *outputs]) == 2
    assert f"data.held_out: 0.1 here, but {before} was made with 0.002" in capsys.readouterr().err
    assert list((tmp_path / "shards").iterdir()) == [before]


def test_the_command_reads_the_settings_of_a_whole_run(corpus: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"out_dir: x\nmodel: {{d_model: 64}}\ntrain: {{tokens: 5}}\ntokenizer: {{vocab_size: 512}}\n"
        f"data: {{source: {corpus}, shards_dir: {tmp_path / 'shards'}, held_out: 0.1, shard_tokens: 4096}}\n"
    )
    line = ["prepare", "--config", str(path), "--tokens", "6_000", "--tokenizer_out", str(tmp_path / "tokenizer")]
    assert main(line) == 0
    out = capsys.readouterr().out
    (folder,) = (tmp_path / "shards").iterdir()
    shards = Shards.open(folder)
    assert f"{folder}: 2 shards, more can follow" in out
    assert f"train      {shards.train_tokens:,} tokens in" in out
    assert "skipped    no rows" in out
    assert main(["prepare", "--data", str(corpus), "--data.shard_tokns", "3"]) == 2
    assert "did you mean --data.shard_tokens?" in capsys.readouterr().err
    path.write_text(f"dta: {{}}\ndata: {{source: {corpus}}}\n")
    assert main(line) == 2
    assert f"dta: unknown setting (in {path}, command line)" in capsys.readouterr().err


def test_a_stop_by_hand_says_how_to_go_on(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def stopped(*_: Any, **__: Any) -> Shards:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "prepare_shards", stopped)
    line = ["prepare", "--data", str(corpus), "--tokenizer.vocab_size", "512", "--tokenizer_out", str(tmp_path)]
    assert main(line) == 130
    assert capsys.readouterr().err.endswith("stopped; complete shards are kept, and the same command continues after them\n")


def test_a_mixture_is_prepared_by_weight_and_shown_by_source(corpus: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "b.jsonl").write_bytes((corpus / "a.jsonl").read_bytes())
    line = ["prepare", "--data.mix", f"{corpus}=3,{tmp_path / 'other'}=1", "--tokens", "40_000", "--data.shard_tokens", "1024"]
    line += ["--tokenizer.vocab_size", "512", "--tokenizer_out", str(tmp_path), "--data.shards_dir", str(tmp_path / "shards")]
    assert main(line) == 0
    out = capsys.readouterr().out
    tokens = [int(found.replace(",", "")) for found in re.findall(r"train +([\d,]+) tokens", out)]
    assert [30_000 <= tokens[0] < 33_000, 10_000 <= tokens[1] < 13_000] == [True, True]
    assert out.count("more can follow") == 2
    assert len(list((tmp_path / "shards").iterdir())) == 2


def test_a_damaged_shard_is_named_and_made_again(corpus: Path, tmp_path: Path, capsys: Capture) -> None:
    line = ["prepare", "--data", str(corpus), "--data.shard_tokens", "8192", "--data.shards_dir", str(tmp_path / "shards")]
    line += ["--tokenizer.vocab_size", "512", "--tokenizer_out", str(tmp_path)]
    assert main([*line, "--rebuild"]) == 2
    assert "holds no token shards" in capsys.readouterr().err
    assert main(line) == 0
    assert "skipped    2 null" in capsys.readouterr().out
    (folder,) = (tmp_path / "shards").iterdir()
    path = folder / "train-00001.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    assert main(line) == 2
    assert f"{path}: has {len(whole) - 2:,} bytes instead of {len(whole):,}; make it again" in capsys.readouterr().err
    assert main([*line, "--rebuild"]) == 0
    assert f"{corpus}: made again: {path}\n" in capsys.readouterr().out
    assert path.read_bytes() == whole
    assert main([*line, "--rebuild"]) == 0
    assert f"{corpus}: every shard is what was written\n" in capsys.readouterr().out

    shutil.rmtree(folder)
    assert main([*line, "--tokens", "1"]) == 0
    assert main([*line, "--rebuild"]) == 0
    assert "1 shard, more can follow" in capsys.readouterr().out
    assert main([*line, "--rebuild", "--tokens", "9_000"]) == 0
    assert "2 shards, more can follow" in capsys.readouterr().out


def running(group: int) -> list[str]:
    """Return the processes of a group that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append((path.parent / "cmdline").read_text())
    return found


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_ends_in_one_line_and_leaves_no_process(tmp_path: Path) -> None:
    rng = random.Random(2)
    words = ["the", "of", "and", "in", "that", "was", "his", "with", "for", "had", "you", "not"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": " ".join(rng.choices(words, k=2000))}) for _ in range(6000)))
    line = ["--data", "a.jsonl", "--tokenizer.vocab_size", "512", "--tokenizer.sample_bytes", "100_000", "--data.shard_tokens", "1_000_000"]
    with subprocess.Popen([*COMMAND, *line], cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True) as run:
        while not list(tmp_path.glob("outputs/shards/*/train-00001.bin")):
            assert run.poll() is None
            time.sleep(0.05)
        os.killpg(run.pid, signal.SIGINT)  # a terminal sends it to every process of the group
        _, err = run.communicate(timeout=30)
    assert run.returncode == 130
    assert "Traceback" not in err
    assert err.rstrip().endswith("stopped; complete shards are kept, and the same command continues after them")
    for _ in range(50):
        if not (left := running(run.pid)):
            break
        time.sleep(0.1)
    assert left == []
    (folder,) = (tmp_path / "outputs" / "shards").iterdir()
    assert len(Shards.open(folder).train) >= 1  # the second file may have got its name just before the manifest would have named it


@pytest.fixture
def hub_without_data_sets() -> Iterator[str]:
    class NotFound(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), NotFound)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def prepared_from_hub(name: str, endpoint: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run the command for real in a process of its own: the hub's library reads its address when it is imported."""
    return subprocess.run(
        [sys.executable, "-c", "import sys; from minifoundation.cli import main; sys.exit(main(sys.argv[1:]))", "prepare", "--data", name],
        env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_hub_name_without_a_network_is_one_line(tmp_path: Path) -> None:
    done = prepared_from_hub("fineweb", "http://127.0.0.1:9", tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == (
        "error: data.source: fineweb (HuggingFaceFW/fineweb on the Hugging Face Hub) cannot be reached ([Errno 111] Connection refused); "
        "connect to the network, or give --data a path"
    )


def test_a_data_set_that_left_the_hub_names_another(hub_without_data_sets: str, tmp_path: Path) -> None:
    done = prepared_from_hub("slimpajama", hub_without_data_sets, tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "error: data.source: slimpajama (cerebras/SlimPajama-627B on the Hugging Face Hub) is not there; "
        "use fineweb-edu, or download a copy such as DKYoon/SlimPajama-6B and give --data its folder\n"
    )
