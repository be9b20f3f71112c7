"""Long context: speed and memory at 16k to 64k tokens, the loss of later positions after extension, and recall beyond the old length.

    python -m benchmarks.long_context speed                      one GPU: 0.5B and 1B at 16k, 32k and 64k under each kind of checkpointing
    python -m benchmarks.long_context speed --only '1B 64k'      rows whose name matches, put beside those that are kept; --list names them
    python -m benchmarks.long_context attention                  one GPU: the kernels of attention at these lengths
    python -m benchmarks.long_context quality --corpus wiki      one GPU: a model of 2k extended to 8k by each scaling
    python -m benchmarks.long_context recall                     any device: a small model finds what it was told, beyond the old length
    python -m benchmarks.long_context --tables                   what is kept, as the tables of docs/long-context.md
    python -m benchmarks.long_context --quick                    every part, tiny, on any device

Steps are those of ``pretrain`` (``train/trial.py``) on random tokens, one row a micro-batch; times are medians after two steps to warm up.
Each part keeps its figures in docs/data/long_context.json beside those of the others.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import re
import statistics
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from benchmarks.apart import apart, context
from benchmarks.record import ROOT, finish, machine
from minifoundation import cli, config, runtime
from minifoundation.checkpoint import load_checkpoint
from minifoundation.config import RunConfig
from minifoundation.data.rows import all_documents
from minifoundation.model.size import n_parameters
from minifoundation.report.reach import picture
from minifoundation.train.kernels import milliseconds, usable_kernels
from minifoundation.train.reach import NOISE, PLACES
from minifoundation.train.trial import trial

PARTS = ("speed", "attention", "quality", "recall")
MODELS = {"0.5B": "model_0p5b", "1B": "model_1b"}
LENGTHS = (16_384, 32_768, 65_536)
CHECKPOINTING = ("none", "attention", "offload", "full")
BAR = {"1B": (52_000, 36_000, 22_000), "0.5B": (93_000, 63_000, 39_000)}
"""Tokens/s to reach at each length."""
SECONDS_A_ROW = 150.0
TINY = {"d_model": 64, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_ff": 128, "vocab_size": 512, "original_seq_len": 64}


class Row(NamedTuple):
    """A setting whose steps are timed."""

    model: str
    seq_len: int
    checkpointing: str
    grad_accum: int = 1
    precision: str = "bf16"

    @property
    def name(self) -> str:
        accumulated = "" if self.grad_accum == 1 else f" x{self.grad_accum}"
        return f"{self.model} {self.seq_len // 1024}k {self.checkpointing}{accumulated}{' fp8' if self.precision == 'fp8' else ''}"

    def run(self) -> RunConfig:
        tiny = self.model == "tiny"
        values = {"model": TINY} if tiny else config.read_yaml(ROOT / "configs" / f"{MODELS[self.model]}.yaml")
        original = TINY["original_seq_len"] if tiny else 4096
        ours = {
            "model": {"checkpointing": self.checkpointing, "rope": {"scaling": "yarn", "factor": self.seq_len / original}},
            "data": {"source": "random tokens"},
            "train": {
                "tokens": 10**12,
                "seq_len": self.seq_len,
                "batch_size": 1,
                "grad_accum": self.grad_accum,
                "precision": self.precision,
                "loss_chunk": 8192,
                "compile": not tiny,
            },
        }
        return config.build(RunConfig, config.merged(values, ours), self.name)


def speed_rows(quick: bool) -> list[Row]:
    """Return the rows, those that matter most first."""
    if quick:
        return [Row("tiny", 1024, way) for way in ("none", "attention", "full")]
    best = [Row(model, length, "none") for model in MODELS for length in reversed(LENGTHS)]
    accumulated = [row._replace(grad_accum=4) for row in best]  # as longft's steps are: the optimizer takes its share once in four rows
    rest = [Row(model, length, way) for way in CHECKPOINTING[1:] for model in reversed(MODELS) for length in reversed(LENGTHS)]
    eight = [Row(model, length, "attention", precision="fp8") for model in reversed(MODELS) for length in LENGTHS[1:]]
    return [*best, *rest[:6], *accumulated, *rest[6:], *eight]


def step_figures(row: Row, steps: int) -> dict[str, Any]:
    """Return what steps of ``row`` take."""
    return trial(row.run(), runtime.machine(), steps=steps, warm_up=2).figures()


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Time the rows that match, each in a process of its own."""
    began, where = time.monotonic(), context()
    results: dict[str, Any] = {}
    for row in speed_rows(options.quick):
        left = options.seconds - (time.monotonic() - began)
        if not re.search(options.only, row.name):
            continue
        if left < 25:
            print(f"not run, out of time: {row.name}", flush=True)
            continue
        figures = apart(where, step_figures, row, 2 if options.quick else options.steps, seconds=min(left, SECONDS_A_ROW))
        results[row.name] = {**row._asdict(), **figures}
        print(f"{time.monotonic() - began:6.1f} s  {row.name}: {figures}", flush=True)
    return results


def attention(options: argparse.Namespace) -> dict[str, Any]:
    """Time forward and backward of every kernel of attention that can run, at the shapes of the models."""
    device = runtime.machine()
    found: dict[str, Any] = {}
    for row in [Row("tiny", 1024, "none")] if options.quick else [Row(model, length, "none") for model in MODELS for length in LENGTHS]:
        run = row.run()
        kernels = [kernel for kernel in usable_kernels(run, device) if kernel not in ("efficient", "math")] or ["auto"]
        times = milliseconds(kernels, run, device)
        shape = run.model
        # Two products forward and five backward (scores are made again), each 2 x T/2 x T x heads x width.
        flops = 7 * row.seq_len**2 * shape.n_head * shape.head_width
        name = f"{row.model} {row.seq_len // 1024}k"
        found[name] = {kernel: {"ms": round(ms, 3), "tflops": round(flops / ms / 1e9, 1)} for kernel, ms in times.items()}
        print(f"{name}: {found[name]}", flush=True)
    return found


SCALINGS = ("none", "linear", "ntk", "yarn", "theta")


class Quality(NamedTuple):
    """The sizes of the comparison of scalings."""

    model: dict[str, Any]
    original: int
    length: int
    vocabulary: int
    held_out: int
    """Documents longer than ``length`` that are kept out of training."""
    held_out_bytes: int
    """What a document has to have to be chosen for that."""
    tokens: int
    rows: int
    """Of pretraining at once."""
    extension_tokens: int
    extension_rows: int
    lr: float


FULL = Quality(
    {"d_model": 768, "n_layer": 12, "n_head": 12, "n_kv_head": 4, "d_ff": 2048},
    original=2048,
    length=8192,
    vocabulary=16_384,
    held_out=240,
    held_out_bytes=40_000,
    tokens=100_000_000,
    rows=32,
    extension_tokens=8_388_608,
    extension_rows=8,
    lr=1e-3,
)
SMALL = Quality(
    {"d_model": 32, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_ff": 64},
    original=64,
    length=256,
    vocabulary=512,
    held_out=4,
    held_out_bytes=1500,
    tokens=40_960,
    rows=8,
    extension_tokens=4096,
    extension_rows=2,
    lr=3e-3,
)


def split_by_length(corpus: Path, folder: Path, sizes: Quality) -> tuple[Path, Path]:
    """Write the documents of ``corpus`` to train on, and the long ones that are held out, chosen by their hashes; return both files."""
    data = config.DataConfig(source=str(corpus), max_document_bytes=2048 if sizes is SMALL else 4_194_304)
    texts = list(all_documents(str(corpus), data))
    long = [text for text in texts if len(text.encode()) >= sizes.held_out_bytes]
    held_out = set(sorted(long, key=lambda text: hashlib.blake2b(text.encode(), digest_size=8).digest())[: sizes.held_out])
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, chosen in zip(paths, (False, True), strict=True):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts if (text in held_out) is chosen), encoding="utf-8")
    print(
        f"{len(texts):,} documents, {len(long):,} of {sizes.held_out_bytes:,} bytes and more, of which {len(held_out)} are held out",
        flush=True,
    )
    return paths


def command(*words: object) -> None:
    """Run one command line of the toolkit."""
    code = cli.main([str(word) for word in words])
    if code:
        raise SystemExit(code)


def table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def quality(options: argparse.Namespace) -> dict[str, Any]:
    """Pretrain at one length, extend to four times that with each scaling, and compare the loss of held-out long documents by position."""
    sizes = SMALL if options.quick else FULL._replace(tokens=options.tokens, extension_tokens=options.extension_tokens)
    corpus = ROOT / "examples" / "shakespeare.txt" if options.quick else options.corpus
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train, held_out = split_by_length(corpus, folder, sizes)
        base = {
            "model": {
                **sizes.model,
                "original_seq_len": sizes.original,
                "vocab_size": sizes.vocabulary,
                "attention": "auto" if options.quick else "flash",  # the same for all: only the scaling differs
            },
            "tokenizer": {"vocab_size": sizes.vocabulary, "sample_bytes": 10_000_000},
            "data": {"source": str(train), "shards_dir": str(folder / "shards"), "held_out": 0.01, "shard_tokens": 4_194_304},
            "train": {
                "seq_len": sizes.original,
                "batch_size": sizes.rows,
                "tokens": sizes.tokens,
                "lr": sizes.lr,
                "precision": "fp32" if options.quick else "bf16",
                "compile": not options.quick,
                "eval_every": 10**9,
                "save_every": 10**9,
            },
        }
        if options.tokenizer:
            base["tokenizer"] = {"path": str(options.tokenizer)}
        (folder / "run.yaml").write_text(json.dumps(base))  # which is YAML too
        began = time.monotonic()
        command("pretrain", "--config", folder / "run.yaml", "--out_dir", folder / "run")
        steps = table(folder / "run" / "metrics.csv")
        rate = statistics.median(float(row["tokens_per_second"]) for row in steps)
        parameters = n_parameters(load_checkpoint(folder / "run" / "final.pth").config.model)
        found["pretraining"] = {
            **{key: value for key, value in sizes._asdict().items() if key != "model"},
            "model": sizes.model,
            "parameters": parameters,
            "tokens_per_second": round(rate),
            "seconds": round(time.monotonic() - began, 1),
            "loss": round(float(steps[-1]["loss"]), 4),
            "held_out_bits_per_byte": float(steps[-1]["held_out_bits_per_byte"] or "nan"),
        }
        print(json.dumps({"pretraining": found["pretraining"]}), flush=True)
        for scaling in SCALINGS:
            began, out = time.monotonic(), folder / scaling
            line = ["longft", "--ckpt_in", folder / "run" / "final.pth", "--out_dir", out, "--seq_len", sizes.length]
            line += ["--batch_size", sizes.extension_rows, "--tokens", sizes.extension_tokens, "--lr", sizes.lr / 10]
            line += ["--model.rope.scaling", scaling, "--train.eval_every", 10**9, "--train.save_every", 10**9]
            command(*line, "--proof_data", held_out, "--proof_documents", sizes.held_out, "--needles", 0)
            places = table(out / "loss_by_position.csv")
            steps = table(out / "metrics.csv")
            by_position = [{key: float(value) for key, value in place.items()} for place in places]
            found[scaling] = {
                "positions": by_position,
                "tokens_per_second": round(statistics.median(float(row["tokens_per_second"]) for row in steps)),
                "seconds": round(time.monotonic() - began, 1),
            }
            print(json.dumps({scaling: found[scaling]}), flush=True)
    if not options.quick:
        plot_quality(found, sizes.original, ROOT / "docs" / "data" / "long_context_quality.png")
    return found


def plot_quality(found: dict[str, Any], original: int, path: Path) -> None:
    """Draw loss by position without extension and after each."""

    def curve(scaling: str, column: str) -> list[tuple[float, float]]:
        return [((place["first"] + place["last"]) / 2, place[column]) for place in found[scaling]["positions"]]

    curves = {"before": curve("none", "before"), "before, in sliding windows": curve("none", "before_sliding")}
    curves |= {scaling: curve(scaling, "after") for scaling in SCALINGS}
    path.write_bytes(picture(curves, {}, original))


WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand part place case "
    "week company system program question work government number night point home water room mother area money story fact month"
)


class Recall(NamedTuple):
    """The sizes of the model that repeats what it was told."""

    original: int = 256
    lengths: tuple[int, ...] = (1024, 4096)
    """To which it is extended, one after the other."""
    d_model: int = 384
    n_layer: int = 4
    vocabulary: int = 512
    tokens: int = 48_000_000
    extension_tokens: int = 32_000_000
    text_tokens: int = 16_000_000
    """Of each length at most; read several times."""
    lr: float = 1e-3
    extension_lr: float = 1e-3
    scaling: str = "yarn"
    tries: int = 10


def secret(random: Random) -> int:
    """Return a number of five digits, half the time of only two or three different ones: then one digit does not tell the next."""
    digits = "0123456789" if random.random() < 0.5 else random.sample("0123456789", random.randint(2, 3))
    first = random.choice([digit for digit in digits if digit != "0"])
    return int(first + "".join(random.choices(digits, k=4)))


def told(random: Random, n_words: int) -> str:
    """Return a text of about ``n_words`` words in which facts are told and, anywhere after that, told again: sentences of the needles.

    How many there are differs by orders of magnitude: where hardly anything else is said looking up is learnt soon, and only a lone fact
    among all the words of a row is what a needle will be.
    """
    if random.random() < 0.25:
        key = secret(random)
        asked = [f"\nWhat is the pass key? The pass key is {key}.\n"] * random.randint(1, 3)
        facts = [f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n", *asked]
        filler = [NOISE] * (n_words // 18)
    else:
        count = round(2 * max(1.0, n_words / 20) ** random.random())
        names = random.sample(PLACES, random.randint(1, min(len(PLACES), count // 2)))
        once = [f"\nThe secret number of {name} is {secret(random)}.\n" for name in names]
        facts = [*once, *once, *random.choices(once, k=count - 2 * len(once))]
        random.shuffle(facts)
        filler = [word + " " for word in random.choices(WORDS.split(), k=max(8, n_words - 8 * count))]
    places = sorted(random.randint(0, len(filler)) for _ in facts)
    parts, at = [], 0
    for place, fact in zip(places, facts, strict=True):
        parts += [*filler[at:place], fact]
        at = place
    return "".join([*parts, *filler[at:]])


def recall(options: argparse.Namespace) -> dict[str, Any]:
    """Train a small model to repeat what it was told, extend it, and count the needles that it finds before and after."""
    sizes = (
        Recall(original=128, lengths=(256,), d_model=32, n_layer=2, tokens=4096, extension_tokens=8192, tries=1)
        if options.quick
        else Recall()
    )
    random, found = Random(0), {}
    cuda = runtime.machine().is_cuda
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain = (" ".join(random.choices(WORDS.split(), k=500)) for _ in range(200))  # what needles are hidden in tells no other facts
        (folder / "plain.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in plain))
        for length, tokens in [(sizes.original, sizes.tokens), *((length, sizes.extension_tokens) for length in sizes.lengths)]:
            texts = (
                told(random, random.randint(length // 4, 3 * length // 4))
                for _ in range(max(64, min(tokens, sizes.text_tokens) // (length // 2)))
            )
            (folder / f"{length}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        base = {
            "model": {
                "vocab_size": sizes.vocabulary,
                "d_model": sizes.d_model,
                "n_layer": sizes.n_layer,
                "n_head": 4,
                "n_kv_head": 4,
                "d_ff": 3 * sizes.d_model,
                "original_seq_len": sizes.original,
            },
            "tokenizer": {"kind": "bpe", "vocab_size": sizes.vocabulary, "sample_bytes": 1_000_000},  # whole words and single digits
            "data": {"source": str(folder / f"{sizes.original}.jsonl"), "shards_dir": str(folder / "shards"), "held_out": 0.05},
            "train": {
                "seq_len": sizes.original,
                "batch_size": 32 if cuda else 16,
                "tokens": sizes.tokens,
                "lr": sizes.lr,
                "spike_z": None,  # to look something up is learnt all at once, in steps whose gradients are many times the usual
                "precision": "bf16" if cuda else "fp32",
                "eval_every": 10**9,
                "save_every": 10**9,
            },
        }
        (folder / "run.yaml").write_text(json.dumps(base))
        command("pretrain", "--config", folder / "run.yaml", "--out_dir", folder / "run")
        before = folder / "run"
        for length in sizes.lengths:
            out = folder / f"to {length}"
            line = [
                "longft",
                "--ckpt_in",
                before / "final.pth",
                "--out_dir",
                out,
                "--data",
                folder / f"{length}.jsonl",
                "--seq_len",
                length,
            ]
            line += [
                "--batch_size",
                max(1, (16_384 if cuda else 4096) // length),
                "--tokens",
                sizes.extension_tokens,
                "--lr",
                sizes.extension_lr,
            ]
            command(
                *line,
                "--needles",
                sizes.tries,
                "--proof_data",
                folder / "plain.jsonl",
                "--train.eval_every",
                10**9,
                "--train.save_every",
                10**9,
            )
            needles = table(out / "needles.csv")
            shares = {}
            for when in ("before", "after"):
                for tried in sorted({int(needle["length"]) for needle in needles}):
                    here = [needle for needle in needles if int(needle["length"]) == tried]
                    shares[f"{when}, {tried}"] = round(sum(int(n[f"found_{when}"]) for n in here) / sum(int(n["tries"]) for n in here), 4)
            found[f"to {length}"] = {**sizes._asdict(), "share_found": shares, "needles": needles}
            print(f"to {length}: {shares}", flush=True)
            if not options.quick:
                (ROOT / "docs" / "data" / f"long_context_recall_{length}.png").write_bytes((out / "long_context.png").read_bytes())
            before = out
    return found


def kept(results: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of docs/data/long_context.json with ``results`` in the place of what was measured again."""
    path = ROOT / "docs" / "data" / "long_context.json"
    parts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else {}
    for part, found in results.items():
        before = parts.get(part, {})
        parts[part] = {**before, **{name: {"measured_on": machine(), **figures} for name, figures in found.items()}}
    return parts


def summary(parts: dict[str, Any]) -> dict[str, Any]:
    """Return the figures in short."""
    figures: dict[str, Any] = {}
    if rows := parts.get("speed"):
        figures["tokens_per_second"] = {name: row.get("tokens_per_second", row.get("failed")) for name, row in rows.items()}
        figures["peak_gib"] = {name: row["peak_gib"] for name, row in rows.items() if "peak_gib" in row}
        for model, bars in BAR.items():
            for length, bar in zip(LENGTHS, bars, strict=True):
                there = [
                    row["tokens_per_second"] for row in rows.values() if row["model"] == model and row["seq_len"] == length and "mfu" in row
                ]
                if there:
                    figures[f"{model} {length // 1024}k over {bar:,}"] = round(max(there) / bar, 3)
    if rows := parts.get("quality"):
        for scaling in SCALINGS:
            places = rows[scaling]["positions"]
            end = next(place for place in places if place["last"] + 1 == rows["pretraining"]["original"])
            figures[f"loss at the end, {scaling}"] = {
                "before": places[-1]["before"],
                "before, in windows": places[-1]["before_sliding"],
                "after": places[-1]["after"],
                "before, at the original end": end["before"],
                "after, at the original end": end["after"],
                "documents": places[-1]["documents"],
            }
    if rows := parts.get("recall"):
        figures["recall"] = {name: row["share_found"] for name, row in rows.items()}
    return figures


def tables(parts: dict[str, Any]) -> str:
    """Return the figures as the tables of docs/long-context.md."""
    lines: list[str] = []

    def add(header: list[str], rows: list[list[str]]) -> None:
        lines.extend(["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]])
        lines.append("")

    if rows := parts.get("speed"):
        found = [
            [
                name,
                f"{row['tokens_per_second']:,}",
                f"{row['mfu']:.1%}" if row["mfu"] else "",
                f"{row['peak_gib']:.1f}",
                f"{row['predicted_gib']:.1f}",
            ]
            if "peak_gib" in row
            else [name, row["failed"].splitlines()[0][:60], "", "", ""]
            for name, row in rows.items()
        ]
        add(["model, length, checkpointing", "tokens/s", "MFU", "peak GiB", "predicted"], found)
    if rows := parts.get("attention"):
        kernels = list(dict.fromkeys(kernel for row in rows.values() for kernel in row if kernel != "measured_on"))
        cells = [[name, *(f"{row[k]['ms']} ({row[k]['tflops']})" if k in row else "" for k in kernels)] for name, row in rows.items()]
        add(["ms (TFLOP/s)", *kernels], cells)
    if rows := parts.get("quality"):
        places = rows["none"]["positions"]
        header = ["positions", "documents", "before", "in windows", *SCALINGS]
        cells = [
            [
                f"{place['first']:,.0f} to {place['last']:,.0f}",
                f"{place['documents']:.0f}",
                f"{place['before']:.3f}",
                f"{place['before_sliding']:.3f}",
                *(f"{rows[scaling]['positions'][number]['after']:.3f}" for scaling in SCALINGS),
            ]
            for number, place in enumerate(places)
        ]
        add(header, cells)
    if rows := parts.get("recall"):
        for name, row in rows.items():
            add([f"{name}: found", "share"], [[where, f"{share:.1%}"] for where, share in row["share_found"].items()])
    return "\n".join(lines)


def main() -> None:
    """Measure the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=PARTS, help="which part; every one with --quick")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--list", action="store_true", help="print the names of speed's rows")
    parser.add_argument("--tables", action="store_true", help="measure nothing: print what is kept as tables")
    parser.add_argument("--only", default="", help="a regular expression that names must match")
    parser.add_argument("--corpus", type=Path, help="text for quality: a file or folder with documents of 8k tokens and more")
    parser.add_argument("--tokenizer", type=Path, help="for quality; without one it is trained on the corpus")
    parser.add_argument("--tokens", type=int, default=FULL.tokens, help="of quality's pretraining")
    parser.add_argument("--extension_tokens", type=int, default=FULL.extension_tokens, help="of each of its extensions")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=900.0, help="start no row after this long")
    options = parser.parse_args()
    if options.tables:
        print(tables(kept({})))
        return
    if options.list:
        print("\n".join(row.name for row in speed_rows(options.quick)))
        return
    if options.part is None and not options.quick:
        parser.error(f"name a part ({', '.join(PARTS)}), or give --quick")
    if options.part == "quality" and options.corpus is None and not options.quick:
        parser.error("quality needs --corpus")
    measure = {"speed": speed, "attention": attention, "quality": quality, "recall": recall}
    results = {part: measure[part](options) for part in PARTS if options.part in (None, part)}
    parts = results if options.quick else kept(results)
    finish("long_context", {"parts": list(parts), **summary(parts)}, results=parts, quick=options.quick)


if __name__ == "__main__":
    main()
