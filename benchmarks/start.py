"""From `pretrain` typed to the end of the first optimizer step, phase by phase, with the data ready.

    python -m benchmarks.start                   0.5B on one GPU, compiled: with an empty compile cache, then with the one it has left
    python -m benchmarks.start --config demo     the small model, on any device
    python -m benchmarks.start --quick           a tiny one, not compiled

The goal is 15 s, and 6 s with a warm cache, beyond importing torch and opening CUDA. Each start is a process of its own that runs the
ordinary command and stops after its first step.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TINY = ["--model.d_model", "32", "--model.n_layer", "2", "--model.n_head", "4", "--model.n_kv_head", "2", "--model.d_ff", "64"]
TINY += ["--model.original_seq_len", "64", "--seq_len", "64", "--tokenizer.vocab_size", "600", "--data.max_document_bytes", "1024"]
NOT_OURS = ("import torch", "open CUDA")
FIGURES = "start.json"
CACHES = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "QUACK_CACHE_DIR": "quack",
    "XDG_CACHE_HOME": "home",  # FlashAttention 4's
}
"""Where compiled code is kept, by the variable that says so."""


class FirstStepDone(BaseException):
    """Ends a run after its first step; no handler of errors takes it for one."""


def child(folder: Path, began: float, arguments: list[str]) -> None:
    """Run ``pretrain`` until its first step is done and write the seconds of each phase to ``folder``.

    Args:
        began: when the process was started, in seconds since the epoch.
    """
    phases: dict[str, float] = {}
    kernels: list[str] = []
    last = began

    def mark(phase: str) -> None:
        nonlocal last
        now = time.time()
        phases[phase] = phases.get(phase, 0.0) + now - last
        last = now

    def timed(module: Any, name: str, phase: str) -> None:
        """Have a call of ``module.name`` end the phase "set-up" where it begins, and ``phase`` where it ends."""
        function: Callable[..., Any] = getattr(module, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            mark("set-up")
            result = function(*args, **kwargs)
            mark(phase)
            if name == "chosen_kernels":
                kernels.extend(result[1])
            return result

        setattr(module, name, called)

    def timed_load(module: Any) -> None:
        """Have the import of a kernel library be a phase of its own."""
        load: Callable[[str], Any] = module.load

        def called(library: str) -> Any:
            if library in sys.modules:
                return load(library)
            mark("choose the kernels")
            found = load(library)
            mark("import kernel libraries")
            return found

        module.load = called

    mark("start Python")
    import torch

    mark("import torch")
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
    mark("open CUDA")
    from minifoundation import cli
    from minifoundation.model.kernels import flash4, gated
    from minifoundation.train import loop, run, step

    mark("import the rest")
    import torch._dynamo

    mark("import torch's compiler")  # which making an optimizer does too
    timed(run, "training_data", "open the data")
    timed(run, "chosen_kernels", "choose the kernels")
    timed_load(flash4)
    timed_load(gated)
    timed(run, "built", "model and optimizer")

    def first_step(*args: Any, **kwargs: Any) -> Any:
        mark("first batch")
        step.train_step(*args, **kwargs).read()
        mark("first step")
        raise FirstStepDone

    setattr(loop, "train_step", first_step)  # noqa: B010
    try:
        cli.main(["pretrain", *arguments])
    except FirstStepDone:
        (folder / FIGURES).write_text(json.dumps([phases, kernels]), encoding="utf-8")


def start(folder: Path, arguments: list[str]) -> tuple[dict[str, float], list[str]]:
    """Return the seconds of each phase of one start, and what it said of kernels; its compile caches are in ``folder``."""
    caches = {variable: str(folder / name) for variable, name in CACHES.items()}
    program = "import sys, benchmarks.start as this; this.child(this.Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])"
    command = [sys.executable, "-c", program, str(folder), repr(time.time()), *arguments]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **caches}, capture_output=True, text=True, check=False)
    if not (folder / FIGURES).exists():
        raise SystemExit(f"pretrain did not come to its first step:\n{done.stderr[-2000:]}")
    phases, kernels = json.loads((folder / FIGURES).read_text(encoding="utf-8"))
    (folder / FIGURES).unlink()
    return phases, kernels


def main() -> None:
    """Prepare the data, then start twice."""
    from benchmarks.record import finish  # it imports torch, which a child has to do itself, and be timed at

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--config", default="model_0p5b", help="configs/<name>.yaml")
    parser.add_argument("--corpus", type=Path, default=ROOT / "examples" / "shakespeare.txt")
    parser.add_argument("--tokenizer", type=Path, help="else one of 600 pieces is trained, and the model has that vocabulary")
    parser.add_argument("--batch_size", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = TINY if options.quick else ["--config", f"configs/{options.config}.yaml", "--amp", "--bf16", "--compile"]
        settings += ["--data", str(options.corpus), "--data.shards_dir", str(folder / "shards"), "--data.held_out", "0.05"]
        settings += ["--tokens", "100_000", "--batch_size", str(options.batch_size), "--tokenizer"]
        settings += [str(options.tokenizer or _tokenizer(folder, options.corpus))]
        start(folder, [*settings, "--out_dir", str(folder / "preparing")])  # makes the shards
        for cache in CACHES.values():
            shutil.rmtree(folder / cache, ignore_errors=True)
        starts, said = {}, {}
        for way in ("cold", "warm"):
            starts[way], said[way] = start(folder, [*settings, "--out_dir", str(folder / way)])
    print("\n".join(said["cold"]))
    print(f"{'':<30}{'cold':>8}{'warm':>8}")
    for phase in dict.fromkeys(phase for phases in starts.values() for phase in phases):
        print(f"{phase:<30}" + "".join(f"{starts[way].get(phase, 0.0):>8.2f}" for way in starts))
    beyond = {way: round(sum(s for phase, s in phases.items() if phase not in NOT_OURS), 2) for way, phases in starts.items()}
    print(f"{'without ' + ' and '.join(NOT_OURS):<30}" + "".join(f"{seconds:>8.2f}" for seconds in beyond.values()))
    rounded = {way: {phase: round(seconds, 3) for phase, seconds in phases.items()} for way, phases in starts.items()}
    finish("start", {"seconds_beyond_torch_and_cuda": beyond}, results={**rounded, "kernels": said["cold"]}, quick=options.quick)


def _tokenizer(folder: Path, corpus: Path) -> Path:
    """Return a small tokenizer trained on ``corpus``."""
    prepare = ["prepare", "--data", str(corpus), "--data.shards_dir", str(folder / "other"), "--tokenizer_out", str(folder / "tokenizer")]
    prepare += ["--tokenizer.vocab_size", "600", "--data.max_document_bytes", "4096", "--tokens", "1"]
    subprocess.run([sys.executable, "-m", "src.cli", *prepare], cwd=ROOT, check=True, capture_output=True)
    return folder / "tokenizer" / "tokenizer.model"


if __name__ == "__main__":
    main()
