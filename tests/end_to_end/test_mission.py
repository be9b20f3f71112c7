"""The mission's lines on a tiny configuration, as a person types them: bf16 and torch.compile included."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = """
model: {vocab_size: 512, d_model: 32, n_layer: 2, n_head: 4, n_kv_head: 2, d_ff: 64, original_seq_len: 64}
tokenizer: {vocab_size: 512}
data: {max_document_bytes: 1024, shard_tokens: 4096, held_out: 0.1, shards_dir: shards}
train: {seq_len: 64, lr: 1e-2, eval_every: 20, eval_tokens: 1024, save_every: 10}
"""
PRETRAIN = "pretrain --config tiny.yaml --data text --tokens 10_240 --batch_size 1 --grad_accum 4 --amp --bf16 --compile"


@pytest.fixture
def folder(tmp_path: Path, signals: None) -> Path:
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "verse.txt").write_bytes((ROOT / "examples" / "shakespeare.txt").read_bytes()[:80_000])
    (tmp_path / "src").symlink_to(ROOT / "src")
    return tmp_path


def started(line: str, folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "src.cli", *line.split()]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def typed(line: str, folder: Path, *, code: int = 0) -> str:
    """Run a command line in ``folder`` and return what it printed."""
    process = started(line, folder)
    out, err = process.communicate(timeout=280)
    assert process.returncode == code, err[-3000:]
    return out + err


@pytest.mark.slow
def test_the_lines_one_after_the_other(folder: Path) -> None:
    typed(PRETRAIN, folder)
    assert "holds a finished run; add --resume auto" in typed(PRETRAIN, folder, code=2)
    longft = "longft --ckpt_in outputs/pretrain/final.pth --data text --seq_len 256 --batch_size 1 --grad_accum 2 --amp --bf16"
    assert "after the 10,240 tokens that the phase before has seen" in typed(f"{longft} --tokens 2048", folder)
    typed("export_hf --ckpt outputs/longft/final.pth --out_dir outputs/hf_export", folder)
    assert json.loads((folder / "outputs/hf_export/parity.json").read_text())["equal"] is True
    table = typed(f"eval --model_path outputs/hf_export --tasks arc_easy --limit 4 --data_dir {ROOT}/examples/benchmarks", folder)
    assert "0-shot, acc_norm" in table and (folder / "outputs/hf_export/eval/results.json").is_file()
    text = typed("generate --model outputs/pretrain/final.pth --prompt MENENIUS --max_new_tokens 8 --temperature 0", folder)
    assert text.startswith("MENENIUS") and len(text) > len("MENENIUS\n")


@pytest.mark.slow
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_struck_down_goes_on_to_the_same_weights(folder: Path, blow: signal.Signals) -> None:
    line = PRETRAIN.replace(" --compile", "") + " --tokens 25_600"
    typed(f"{line} --out_dir outputs/whole", folder)
    process = started(line, folder)
    metrics = folder / "outputs" / "pretrain" / "metrics.csv"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < 15:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(blow)
    _, err = process.communicate(timeout=120)
    if blow == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 0 and re.search(r"continue with: \S*python -m src.cli pretrain .* --resume auto", err)
    assert "continuing from outputs/pretrain/step_" in typed(f"{line} --resume auto", folder)
    compare = "import torch,sys; a,b=(torch.load(f'outputs/{n}/final.pth',weights_only=True)['model'] for n in ('whole','pretrain'))"
    check = f"{compare}; sys.exit(not all(torch.equal(a[k],b[k]) for k in a))"
    assert subprocess.run([sys.executable, "-c", check], cwd=folder, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("blow", "said"),
    [(signal.SIGINT, "training 512 unigram pieces"), (signal.SIGTERM, "preparing text"), (signal.SIGHUP, "parameters: 2 blocks")],
)
def test_a_run_that_is_stopped_while_it_starts_begins_anew(folder: Path, blow: signal.Signals, said: str) -> None:
    line = PRETRAIN.replace(" --compile", "")
    process = started(line, folder)
    assert process.stderr is not None
    while said not in (printed := process.stderr.readline()):
        assert printed, "it has ended"
    process.send_signal(blow)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and re.search(r"stopped \(no step was done yet\); continue with: .* --resume auto", err), err
    assert "wrote outputs/pretrain/final.pth" in typed(f"{line} --resume auto", folder)
