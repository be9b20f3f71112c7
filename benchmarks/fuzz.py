"""Settings, YAML files, checkpoints and token shards nobody would write: taken because they are valid, or refused in one line.

    python -m benchmarks.fuzz            10,000 settings, 2,000 YAML files, 2,000 checkpoints and shard folders
    python -m benchmarks.fuzz --quick    a hundredth of that

Never a traceback, never a file changed. The cases are drawn by Hypothesis from what settings look like, from the files of configs/, and
from files that a run has written.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.record import ROOT, finish
from minifoundation import cli, config
from minifoundation.checkpoint import MANIFEST, fault, load_checkpoint, save_final
from minifoundation.checkpoint.files import record_of
from minifoundation.checkpoint.folder import sealed
from minifoundation.config import DataConfig, RunConfig, TokenizerConfig
from minifoundation.data.prepare import prepare_shards, tokenizer_for
from minifoundation.errors import UserError
from minifoundation.train.plan import plan
from tests.checkpoint.made import full, save_step

Outcomes = Counter[str]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**12), 10**12),
    st.sampled_from([0, 1, 2, 7, 8, 64, 128, 4096, 59_392]),
    st.floats(),
    st.sampled_from([0.0, 1e-4, 0.1, 0.5, 1.0, 1e30]),
    st.text(max_size=12),
    st.sampled_from(["auto", "none", "yarn", "bf16", "cosine", "1e-3", "200_000_000", "../x", "/", "", "a=0.5,b=0.5"]),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=4
)
KNOWN = st.sampled_from(config.dotted_names(RunConfig))
NAMES = st.one_of(KNOWN, KNOWN, KNOWN, KNOWN, KNOWN, KNOWN, st.sampled_from(["model", "train", "data", "model.rope"]), st.text(max_size=10))
FIELDS = dict(config.fields(RunConfig))
VALID = config.merged(config.read_yaml(ROOT / "configs" / "model_0p5b.yaml"), {"data": {"source": "text"}, "train": {"tokens": 10**9}})


PLAUSIBLE: dict[type, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.sampled_from([1, 2, 8, 32, 64, 512, 4096, "1_000"]),
    float: st.floats(0.001, 0.999) | st.sampled_from([1, 2.5, "1e-3"]),
    str: st.sampled_from(["text", "fineweb", "a/b:c"]),
}


def plausible(name: str) -> st.SearchStrategy[Any]:
    """Return values of the kind that a setting takes."""
    field = FIELDS.get(name)
    if field is None:
        return VALUES
    kinds = [field.annotation, *get_args(field.annotation)]
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    typed = [PLAUSIBLE[kind] for kind in kinds if kind in PLAUSIBLE]
    return st.one_of(*typed, *([st.sampled_from(words)] if words else []), st.just(None)) if typed or words else VALUES


@st.composite
def nested(draw: st.DrawFn) -> dict[str, Any]:
    """Return the values of a run, some of them replaced, some by others of their kind."""
    values = config.merged(VALID, {})
    for _ in range(draw(st.integers(1, 4))):
        name = draw(NAMES)
        *sections, leaf = name.split(".")
        inner = values
        for section in sections:
            step = inner.get(section)
            inner[section] = dict(step) if isinstance(step, dict) else {}
            inner = inner[section]
        inner[leaf] = draw(plausible(name) if draw(st.booleans()) or draw(st.booleans()) else VALUES)
    return values


@st.composite
def mangled(draw: st.DrawFn, content: bytes) -> bytes:
    """Return ``content`` with some of it cut out, doubled, moved, changed or replaced by what is much like it."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        stop = min(len(content), start + draw(st.sampled_from([0, 1, 2, 8, 64, 10**9])))
        part = content[start:stop]
        pieces = [b"", part + part, part[::-1], bytes(byte ^ draw(st.integers(1, 255)) for byte in part[:1]) + part[1:]]
        pieces += [
            b"\x00",
            b"\xff\xfe",
            b": ",
            b"- ",
            b"{",
            b"}",
            b"\n",
            b"\t",
            b"!!python/object/apply:os.system ['true']",
            b"&a [*a]",
            b"1e999",
        ]
        content = content[:start] + draw(st.sampled_from(pieces)) + content[stop:]
    return content


def told(error: UserError) -> str:
    """Return ``refused`` when an error is one line in three parts."""
    assert "\n" not in str(error), str(error)
    assert error.where and error.problem and error.remedy, str(error)
    return "refused"


def run_command(*arguments: str) -> str:
    """Run a command line and return ``accepted`` or ``refused``; anything else fails."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = cli.main(list(arguments))
    errors = [line for line in err.getvalue().splitlines() if not line.startswith("warning: ")]
    if code == 0:
        return "accepted"
    assert code == 2 and len(errors) == 1 and errors[0].startswith("error: "), (code, errors)
    return "refused"


def tried(count: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], str]) -> Outcomes:
    """Return how often each outcome was had in ``count`` cases."""
    outcomes: Outcomes = Counter()

    @settings(max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def one(case: Any) -> None:
        outcomes[check(case)] += 1

    one()
    return outcomes


def fuzzed_settings(count: int) -> Outcomes:
    """Build settings from values; those that are accepted read back equal from YAML and have a plan."""

    def check(values: dict[str, Any]) -> str:
        try:
            built = config.build(RunConfig, values, "fuzz")
        except UserError as error:
            return told(error)
        yaml = config.to_yaml(built)
        assert config.build(RunConfig, config.yaml_values(yaml, Path("fuzz.yaml")), "fuzz") == built
        if built.train.batch_size != "auto":
            try:
                plan(built, built.train.context_parallel)  # as few processes as can be
            except UserError as error:
                return told(error)
        return "accepted"

    return tried(count, nested(), check)


def fuzzed_yaml(count: int, work: Path) -> Outcomes:
    """Give ``pretrain --dry_run`` mangled copies of the files in configs/."""
    folder = work / "configs"
    folder.mkdir()
    for path in (ROOT / "configs").glob("*.yaml"):
        (folder / path.name).write_bytes(path.read_bytes())
    originals = sorted((ROOT / "configs" / f"{name}.yaml").read_bytes() for name in ("model_0p5b", "demo", "gpu_8gb", "longft"))
    path = folder / "fuzz.yaml"

    def check(content: bytes) -> str:
        path.write_bytes(content)
        line = ["--config", str(path), "--data", "text", "--tokens", "1_000_000_000", "--out_dir", str(work / "run"), "--dry_run"]
        outcome = run_command("pretrain", *line)
        assert path.read_bytes() == content and not (work / "run").exists()
        return outcome

    return tried(count, st.sampled_from(originals).flatmap(mangled), check)


def fuzzed_files(count: int, work: Path) -> Outcomes:
    """Mangle each file of a checkpoint, of ``final.pth`` and of a shard folder; a checkpoint also with its hashes made right again."""
    good = save_step(full(1), work, keep=9)
    bad = save_step(full(2), work, keep=9)
    final = save_final(full(2), work)
    text = work / "text.txt"
    text.write_bytes((ROOT / "examples" / "shakespeare.txt").read_bytes()[:60_000])
    data = DataConfig(source=str(text), shards_dir=work / "shards", shard_tokens=4096, max_document_bytes=512, held_out=0.1)
    tokenizer = tokenizer_for(TokenizerConfig(vocab_size=600), data, work / "tokenizer")
    shards = prepare_shards(str(text), data, tokenizer, tokens=8000, show_progress=False)
    files = [*sorted(bad.iterdir()), final, final.with_name("final.json")]
    folder_files = [path for path in sorted(shards.folder.iterdir()) if path.suffix in (".bin", ".json")]
    contents = {path: path.read_bytes() for path in [*files, *folder_files]}

    def check(case: tuple[Path, bytes, bool]) -> str:
        path, content, resealed = case
        path.write_bytes(content)
        written = dict(contents)
        written[path] = content
        if resealed and path.parent == bad and path.name != MANIFEST:
            written[bad / MANIFEST] = sealed(2, {file.name: record_of(file) for file in sorted(bad.iterdir()) if file.name != MANIFEST})
            (bad / MANIFEST).write_bytes(written[bad / MANIFEST])
        try:
            if path.parent == shards.folder:
                return "shards " + run_command("inspect", "--shards", str(shards.folder), "--verify")
            if content != contents[path] and path.parent == bad and not resealed:
                assert _fault(bad) is not None, "a changed file is not seen"
            try:
                load_checkpoint(bad if path.parent == bad else final)
            except UserError as error:
                return ("resealed " if resealed else "") + told(error)
            return ("resealed " if resealed else "") + "accepted"
        finally:
            assert all(file.read_bytes() == expected for file, expected in written.items()), "a file was changed"
            for file, expected in contents.items():
                if written[file] != expected:
                    file.write_bytes(expected)

    cases = st.sampled_from([*files, *folder_files]).flatmap(lambda path: st.tuples(st.just(path), mangled(contents[path]), st.booleans()))
    outcomes = tried(count, cases, check)
    assert fault(good) is None and fault(bad) is None and fault(final) is None
    return outcomes


def _fault(folder: Path) -> str | None:
    try:
        return fault(folder)
    except UserError as error:
        return str(error)


def main() -> None:
    """Try them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    part = 100 if quick else 1
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        found = {"settings": fuzzed_settings(10_000 // part)}
        print(found, file=sys.stderr, flush=True)
        found["yaml"] = fuzzed_yaml(2_000 // part, work)
        print(found, file=sys.stderr, flush=True)
        found["files"] = fuzzed_files(2_000 // part, work)
    counts = {name: sum(outcomes.values()) for name, outcomes in found.items()}
    results = {name: dict(sorted(outcomes.items())) for name, outcomes in found.items()}
    finish("fuzz", {**counts, "seconds": round(time.perf_counter() - began)}, results=results, quick=quick)


if __name__ == "__main__":
    main()
