"""What the documents say: each command line parses, each error message is the one that is printed, each table is the code's own."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from minifoundation import cli, config
from minifoundation.lock import LOCK
from tests.conftest import Calls

ROOT = config.REPOSITORY
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "Makefile",
    *sorted((ROOT / "examples").glob("*.*")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
LINE = re.compile(
    r"(?:-m src\.cli|\$\(RUN\)|^[ `$]*minifoundation)\s+"
    r"((?:prepare|inspect|pretrain|longft|bench|export_hf|import_hf|eval|eval-data \w+|contamination|report|generate|serve|doctor)"
    r"\s+-[^\n`]*)",
    re.MULTILINE,
)
SESSION = re.compile(r"^\$ python -m src\.cli (.*)\n(error: .*)$", re.MULTILINE)

MISSION = """
python -m src.cli pretrain  --config configs/model_0p5b.yaml --data fineweb --tokens 200_000_000 \\
                            --batch_size 1 --grad_accum 32 --amp --bf16 --compile
python -m src.cli longft    --ckpt_in outputs/pretrain/final.pth --data fineweb --seq_len 16384 \\
                            --batch_size 1 --grad_accum 16 --amp --bf16
python -m src.cli export_hf --ckpt outputs/pretrain/final.pth --out_dir outputs/hf_export
python -m src.cli eval      --model_path outputs/hf_export --tasks configs/tasks.txt --limit 0
"""


def joined(text: str) -> str:
    """Return ``text`` with lines that end in a backslash put together, and the Makefile's folder written out."""
    return re.sub(r"\\\n\s*", "", text).replace("$(DEMO)", "outputs/demo")


def documented() -> list[tuple[str, str]]:
    return [(path.name, line) for path in DOCUMENTS for line in LINE.findall(SESSION.sub("", joined(path.read_text(encoding="utf-8"))))]


def test_the_mission_stands_in_the_readme_verbatim() -> None:
    shown = joined(README)
    lines = [" ".join(line.split()) for line in joined(MISSION).strip().splitlines()]
    assert len(lines) == 4
    assert all(line in " ".join(shown.split()) for line in lines)
    assert "pip install -r requirements.txt" in README


@pytest.mark.parametrize(("document", "line"), documented())
def test_a_documented_line_is_accepted(calls: Calls, monkeypatch: pytest.MonkeyPatch, document: str, line: str) -> None:
    monkeypatch.chdir(ROOT)
    assert cli.main(shlex.split(line, comments=True)) == 0, f"{document}: {line}"
    name, options, values = calls.pop()
    if name in ("pretrain", "longft"):
        below = {"data": {"source": "text"}}
        if name == "longft" or options.init_from is not None:  # the model comes from the checkpoint
            below = config.merged(below, config.read_yaml(ROOT / "configs" / "model_0p5b.yaml"))
            below = config.merged(below, {"model": {"rope": {"scaling": "yarn", "factor": 32}}})
        from_yaml = config.read_yaml(options.config) if options.config else {}
        config.build(config.RunConfig, config.merged(config.merged(below, from_yaml), values), line)


def test_lines_were_found_in_every_kind_of_document() -> None:
    found = {document for document, _ in documented()}
    assert {"README.md", "Makefile", "after_the_demo.txt"} <= found
    assert {line.split()[0] for _, line in documented()} == {
        "prepare",
        "inspect",
        "pretrain",
        "longft",
        "bench",
        "export_hf",
        "import_hf",
        "eval",
        "eval-data",
        "contamination",
        "report",
        "generate",
        "serve",
        "doctor",
    }


@pytest.mark.parametrize(("line", "message"), SESSION.findall(joined(README)))
def test_a_documented_message_is_the_one_that_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    finished = tmp_path / "outputs" / "pretrain" / "final.pth"
    finished.parent.mkdir(parents=True)
    finished.touch()
    monkeypatch.chdir(tmp_path)
    assert cli.main(shlex.split(line)) == 2
    assert capsys.readouterr().err.splitlines()[-1] == message
    files = {path.name for path in (tmp_path / "outputs").rglob("*") if path.is_file()}
    assert files - {LOCK} == {"final.pth"}, "nothing was written but, in a folder that is there, its lock"


def test_the_table_of_flags_is_that_of_the_settings() -> None:
    rows = dict(re.findall(r"^\| `--(\w+)` \| `([\w.]+)` \|", README, re.MULTILINE))
    assert {dotted: flag for flag, dotted in rows.items()} == config.flags(config.RunConfig)


def test_the_table_of_commands_is_that_of_the_program() -> None:
    table = README.split("| command | what it makes |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE) == list(cli.program().commands)


@pytest.mark.parametrize("name", ["model_0p5b", "model_1b"])
def test_the_table_of_sizes_is_that_of_the_presets(name: str) -> None:
    from minifoundation.model.size import n_parameters

    row = re.search(
        rf"^\| `{name}\.yaml` \| (\d+) \S (\d+) \| (\d+)/(\d+) \| (\d+) \| ([\d,]+), tied \| ([\d.,]+)M \|$", README, re.MULTILINE
    )
    assert row is not None
    run = config.build(
        config.RunConfig, config.merged(config.read_yaml(ROOT / "configs" / f"{name}.yaml"), {"data": {"source": "x"}}), name
    )
    model = run.model
    shown = [int(part.replace(",", "")) for part in row.groups()[:6]]
    assert shown == [model.n_layer, model.d_model, model.n_head, model.n_kv_head, model.d_ff, model.vocab_size]
    assert model.tie_embeddings
    assert row[7] == f"{n_parameters(model) / 1e6:,.1f}"
    wide = n_parameters(model.model_copy(update={"d_ff": 4 * model.d_model}))
    assert f"{wide / 1e9:.2f}B" in README, "what a literal 4 d_model would make"


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of ``path``: lower case, no punctuation, dashes for spaces."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.suffix == ".md"], ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\((?!https?:|mailto:)([^)#]*)(?:#([^)]*))?\)", path.read_text(encoding="utf-8"))
    assert [name for name, _ in links if not (path.parent / name).exists()] == []
    assert [f"{name}#{anchor}" for name, anchor in links if anchor and anchor not in anchors(path.parent / name if name else path)] == []
