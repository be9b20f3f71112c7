from __future__ import annotations

import json
import math
import os
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from minifoundation.cli import main
from minifoundation.errors import UserError
from minifoundation.report import plots
from minifoundation.report.evaluations import over_tokens, read_evaluation
from minifoundation.report.runs import read_run
from tests.browser import CHROMIUM, MISSING
from tests.report.made import FINEWEB_EDU, PARAMETERS, SCORES, SPIKE, write_contamination, write_evaluation, write_run

PARITY = {"checks": [{"difference": 3e-6}, {"difference": 1e-7}], "tolerance": 1e-4, "compared": "float32 on the CPU"}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder with a run, contamination found, three evaluations on the way, one of another model, and an export's proof."""
    write_run(tmp_path / "pretrain")
    write_contamination(tmp_path / "pretrain" / "contamination.json")
    write_evaluation(tmp_path / "hf" / "eval", proof=json.dumps(PARITY))
    write_evaluation(tmp_path / "half", tokens=600_000, shift=-0.03)
    write_evaluation(tmp_path / "other", name="Qwen/Qwen2.5-0.5B", shift=0.1)
    return tmp_path


def line(made: Path, *more: str) -> list[str]:
    evals = f"{made / 'hf/eval'},{made / 'half'}"
    return ["report", "--runs", str(made / "pretrain"), "--evals", evals, "--out_dir", str(made / "out"), *more]


class Parsed(HTMLParser):
    """Tags that are open, and everything that would be loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.loaded: list[str] = []
        self.wrong: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "br", "img"):
            self.stack.append(tag)
        self.loaded += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href") and not str(value).startswith("#")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.stack and self.stack[-1] == tag:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.stack or self.stack.pop() != tag:
            self.wrong.append(tag)


def test_the_page_holds_everything_and_loads_nothing(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line(made, "--beside", str(made / "other"), "--name", "mini <1>", "--price_per_hour", "2", "--watts", "700")) == 0
    assert capsys.readouterr().out.splitlines() == [str(made / "out/report.html"), str(made / "out/README.md")]
    page = (made / "out" / "report.html").read_text()
    parsed = Parsed()
    parsed.feed(page)
    assert parsed.wrong == [] and parsed.stack == [] and parsed.loaded == [], "well formed, and no network"
    assert "mini &lt;1&gt;" in page and "mini <1>" not in page.replace('aria-label="', "")
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))
    for score in SCORES.values():
        assert f"{100 * score:.1f} ± 0.6" in text
    for said in (
        "not run: needs --allow_code_exec",
        "12 of 4,688",
        "32.2 =",
        "47.5 ~",
        "36.2 =",
        "Qwen/Qwen2.5-0.5B (re-run here)",
        f"loss spikes: {10 * (SPIKE + 1)}",
        "10.00%",
        "fineweb-edu",
        "largest difference 3.0e-06",
        "0.23 kWh",
        "0.67 cost at 2 an hour",
        "Score against training tokens",
        "python -m src.cli eval --model_path outputs/hf_export --tasks paper --limit 0",
        "by transformers 5.23.0",
    ):
        assert said in text, said
    assert page.count("<svg") == 7, "five curves (one column is empty), ours against others, scores over tokens"


def test_the_card_reads_back_as_the_hub_reads_it(made: Path) -> None:
    from huggingface_hub import ModelCard

    assert main(line(made, "--name", "mini-0.5b", "--license", "mit")) == 0
    card = ModelCard.load(made / "out" / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "mit" and data["datasets"] == ["HuggingFaceFW/fineweb-edu"] and data["pipeline_tag"] == "text-generation"
    (model,) = data["model-index"]
    found = {result["dataset"]["name"]: metric["value"] for result in model["results"] for metric in result["metrics"]}
    assert model["name"] == "mini-0.5b" and found == pytest.approx({name: 100 * score for name, score in SCORES.items()})
    assert "| arc_easy | 10.00% |" in card.text and "78,144" in card.text and "largest difference of logits 3.0e-06" in card.text


def test_points_with_and_without_a_standard_error_are_drawn_together() -> None:
    """``eval.every_steps`` gives none, and ``eval`` of the final weights the same score once more."""
    points: list[tuple[float, float, float | None]] = [(2e6, 60.0, 24.5), (1e6, 55.0, None), (2e6, 60.0, None)]
    drawn = plots.over_tokens({"piqa": points, "lonely": points[:1]}, None)
    assert drawn is not None and "piqa" in drawn and "lonely" not in drawn


def test_the_card_names_every_data_set_of_the_hub_as_the_hub_does_and_tells_files_apart(tmp_path: Path) -> None:
    """The hub links a card to the data sets under ``datasets`` by org/name; a path there would be a broken link."""
    from huggingface_hub import ModelCard

    corpora: dict[str, dict[str, Any]] = {
        "slimpajama": {"hub": "cerebras/SlimPajama-627B", "subset": None, "revision": "2d0accd"},
        "HuggingFaceTB/cosmopedia:web": {"hub": "HuggingFaceTB/cosmopedia", "subset": "web", "revision": "0ae6ec6"},
        "hf://datasets/org/na.me@main/some/*.parquet": {"hub": "hf://datasets/org/na.me@main/some/*.parquet", "revision": "abc"},
        "hf://org/model/data": {"hub": "hf://org/model/data", "revision": "abc"},
        "private/notes": {"files": 1_203, "bytes": 34_500_000_000, "sha256": "ab" * 32},
        "s3://bucket/text": {"files": 1, "bytes": None, "sha256": "cd" * 32},
    }
    write_run(tmp_path / "run", corpora=corpora)
    assert main(["report", "--runs", str(tmp_path / "run"), "--out_dir", str(tmp_path / "out")]) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict()["datasets"] == ["cerebras/SlimPajama-627B", "HuggingFaceTB/cosmopedia", "org/na.me"]
    for text in (card.text, (tmp_path / "out" / "report.html").read_text()):
        assert "HuggingFaceTB/cosmopedia (web) at 0ae6ec6" in text
        assert "1,203 files, 34.5 GB, sha256 abababababab" in text and "1 file, sha256 cdcdcdcdcdcd" in text


@pytest.mark.parametrize(
    ("corpora", "imported_from", "language"),
    [
        ({"fineweb-edu": FINEWEB_EDU, "fineweb": {"hub": "HuggingFaceFW/fineweb", "subset": "sample-10BT", "revision": "ab"}}, None, "en"),
        ({"fineweb-edu": FINEWEB_EDU}, "models/SmolLM2-135M", None),
        ({"fineweb-edu": FINEWEB_EDU, "private/notes": {"files": 3, "bytes": 345, "sha256": "ab" * 32}}, None, None),
        ({"wikimedia/wikipedia:20231101.de": {"hub": "wikimedia/wikipedia", "subset": "20231101.de", "revision": "ab"}}, None, None),
    ],
    ids=["catalogued", "imported", "files beside it", "not catalogued"],
)
def test_the_card_says_a_language_only_where_all_that_was_read_is_known_to_be_in_it(
    tmp_path: Path, corpora: dict[str, dict[str, Any]], imported_from: str | None, language: str | None
) -> None:
    from huggingface_hub import ModelCard

    write_run(tmp_path / "run", corpora=corpora, imported_from=imported_from)
    assert main(["report", "--runs", str(tmp_path / "run"), "--out_dir", str(tmp_path / "out")]) == 0
    assert ModelCard.load(tmp_path / "out" / "README.md").data.to_dict().get("language") == language


@pytest.mark.parametrize("imported_from", [pytest.param(None, marks=pytest.mark.slow), "models/SmolLM2-135M"])
def test_what_an_imported_model_had_read_before_is_claimed_nowhere(tmp_path: Path, imported_from: str | None) -> None:
    write_run(tmp_path / "run", imported_from=imported_from, benchmark="piqa")
    write_evaluation(tmp_path / "eval", imported_from=imported_from)
    write_evaluation(tmp_path / "half", tokens=600_000, imported_from=imported_from)
    write_evaluation(tmp_path / "other", tokens=2_000_000, imported_from="another")
    evals = ",".join(str(tmp_path / name) for name in ("eval", "half", "other"))
    assert main(["report", "--runs", str(tmp_path / "run"), "--evals", evals, "--out_dir", str(tmp_path / "out")]) == 0
    assert main(["report", "--evals", evals, "--out_dir", str(tmp_path / "without")]) == 0
    page, card = ((tmp_path / "out" / name).read_text() for name in ("report.html", "README.md"))
    said = "what those had been trained on, and on how many tokens, is not known here"
    assert all((f"models/SmolLM2-135M, which came from elsewhere: {said}" in text) is (imported_from is not None) for text in (page, card))
    assert ("1.2M training tokens since the import" in card) is (imported_from is not None) and "1.2M training tokens" in card
    assert ("Score against training tokens since the import" in page) is (imported_from is not None)
    assert all((said in path.read_text()) is (imported_from is not None) for path in (tmp_path / "without").iterdir())
    evaluations = [read_evaluation(tmp_path / name) for name in ("eval", "half", "other")]
    found = over_tokens(evaluations, [read_run(tmp_path / "run")])
    assert [tokens for tokens, _, _ in found["arc_easy"]] == [1_200_000, 600_000], "one of another origin has no place there"


def test_tokens_of_phases_that_are_not_given_count(tmp_path: Path) -> None:
    write_run(tmp_path / "run", before=6_400_000, benchmark="piqa")
    run = read_run(tmp_path / "run")
    assert (run.before, run.tokens) == (6_400_000, 1_200_000)
    assert main(["report", "--runs", str(tmp_path / "run"), "--out_dir", str(tmp_path / "out")]) == 0
    assert "7.6M training tokens" in (tmp_path / "out" / "README.md").read_text()
    assert [tokens for tokens, _, _ in over_tokens([], [run])["piqa"]] == [6_800_000, 7_200_000, 7_600_000]


def test_a_row_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", rows=40) / "metrics.csv"
    whole = path.read_text()
    path.write_text(whole + "41")
    assert read_run(tmp_path / "run").tokens == 400_000


def test_a_run_that_a_spreadsheet_saved_and_one_without_a_finite_loss_are_reported(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", rows=2) / "metrics.csv"
    text = path.read_text()
    path.write_text(text, encoding="utf-8-sig")
    assert read_run(tmp_path / "run").tokens == 20_000
    header, *lines = text.splitlines()
    place = header.split(",").index("loss")
    lost = [",".join("nan" if i == place else cell for i, cell in enumerate(line.split(","))) for line in lines]
    path.write_text("\n".join([header, *lost, ""]))
    assert main(["report", "--runs", str(tmp_path / "run"), "--out_dir", str(tmp_path / "report")]) == 0
    assert "no finite loss" in (tmp_path / "report" / "README.md").read_text()


def test_a_sample_is_not_indexed_and_marked(made: Path) -> None:
    path = made / "hf/eval/results.json"
    content = json.loads(path.read_text())
    for row in content["rows"]:
        row["n"] = 5 if row["score"] is not None else 0
    path.write_text(json.dumps(content))
    assert main(line(made)) == 0
    assert "model-index" not in (made / "out/README.md").read_text()
    assert "such scores compare with nothing" in (made / "out/report.html").read_text()


def test_an_evaluation_that_was_stopped_is_marked(made: Path) -> None:
    path = made / "hf/eval/results.json"
    said = "This evaluation was stopped before its end"
    for complete in (True, False):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"complete": complete}))
        assert main(line(made)) == 0
        assert all((said in (made / "out" / name).read_text()) is not complete for name in ("report.html", "README.md"))


def test_the_engine_that_gave_the_scores_is_named(made: Path) -> None:
    path = made / "hf/eval/results.json"
    content = json.loads(path.read_text())
    content["model"]["engine"], content["settings"]["engine"] = "vllm 0.32.0", "vllm"
    path.write_text(json.dumps(content))
    assert main(line(made)) == 0
    for name in ("report.html", "README.md"):
        text = (made / "out" / name).read_text()
        assert "by vllm 0.32.0" in text and "--tasks paper --limit 0 --engine vllm" in text


def test_runs_alone_and_evaluations_alone(made: Path) -> None:
    assert main(["report", "--runs", str(made / "pretrain"), "--out_dir", str(made / "a")]) == 0
    assert main(["report", "--evals", str(made / "half"), "--out_dir", str(made / "b")]) == 0
    runs, evals = (made / "a/report.html").read_text(), (made / "b/report.html").read_text()
    assert 'id="benchmarks"' not in runs and 'id="training"' in runs
    assert 'id="benchmarks"' in evals and 'id="training"' not in evals and "is not proven here" in evals


def test_a_row_that_was_cut_within_a_number_is_no_other_number(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", rows=40, ledger=False) / "metrics.csv"
    whole = read_run(path.parent)
    content = path.read_bytes()
    last = content.rstrip().rfind(b"\n") + 1
    for end in range(last, len(content) - 2):
        path.write_bytes(content[:end])
        cut = read_run(path.parent)
        assert cut.columns["tokens"] == whole.columns["tokens"][:-1] and cut.columns["loss"] == whole.columns["loss"][:-1]
    path.write_bytes(b"\xff\xfe\n" + content)
    with pytest.raises(UserError, match=r"metrics\.csv is damaged \('utf-8' codec"):
        read_run(path.parent)


def test_two_phases_are_one_line_of_training(made: Path) -> None:
    from minifoundation.report.runs import read_run

    write_run(made / "longft", rows=10, ledger=False)
    assert main(["report", "--runs", f"{made / 'pretrain'},{made / 'longft'}", "--out_dir", str(made / "out")]) == 0
    page = (made / "out/report.html").read_text()
    assert "trained in 2 phases" in page and "1.3M" in page and "No checkpoint with a ledger" in page
    assert read_run(made / "longft").tokens == 100_000


def test_scores_measured_while_training_are_drawn_over_its_tokens(made: Path, tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name, benchmark="piqa")) for name in ("one", "two")]
    evaluation = read_evaluation(write_evaluation(tmp_path / "eval", tokens=2_400_000))
    found = over_tokens([evaluation], runs)
    tokens, scores = zip(*((point[0], point[1]) for point in found["piqa"]), strict=True)
    assert tokens == (400_000, 800_000, 1_200_000, 1_600_000, 2_000_000, 2_400_000, 2_400_000)
    assert scores == pytest.approx([28.9, 32.9, 36.9, 28.9, 32.9, 36.9, 100 * SCORES["piqa"]]) and len(found["arc_easy"]) == 1


def test_hours_are_those_of_the_logged_rates(tmp_path: Path) -> None:
    from minifoundation.report.runs import read_run

    run = read_run(write_run(tmp_path / "run"))
    assert run.hours == pytest.approx(1_200_000 / 1000 / 3600)
    assert run.last("held_out_bits_per_byte") == pytest.approx(1.1 + 1 / 120) and run.last("mfu") is None


def test_a_spike_is_what_stands_out() -> None:
    from minifoundation.report.runs import spikes

    smooth = [2 + math.exp(-i / 30) + 0.01 * math.sin(i) for i in range(200)]
    assert spikes(smooth) == []
    assert spikes([value + (0.5 if i == 150 else 0) for i, value in enumerate(smooth)]) == [150]
    assert spikes([value - (0.5 if i == 150 else 0) for i, value in enumerate(smooth)]) == []


def test_a_step_without_a_loss_is_no_spike_and_hides_none(tmp_path: Path) -> None:
    """A step that was skipped since its loss was not finite has none in metrics.csv."""
    from minifoundation.report.plots import curve

    path = write_run(tmp_path / "run") / "metrics.csv"
    header, *rows = path.read_text().splitlines()
    place = header.split(",").index("loss")
    for number in (SPIKE - 20, SPIKE - 2, SPIKE + 5):
        cells = rows[number].split(",")
        rows[number] = ",".join([*cells[:place], "nan", *cells[place + 1 :]])
    path.write_text("\n".join([header, *rows]) + "\n")
    run = read_run(tmp_path / "run")
    assert run.spikes == [10 * (SPIKE + 1)]
    assert "#dc2626" in str(curve([run], "loss", "Training loss", "nats"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "report: nothing to report on; give --runs, --evals or both"),
        (["--runs", "nowhere"], "--runs: nowhere: no such folder; give the out_dir of a pretrain or longft run"),
        (["--evals", "nowhere"], "nowhere: holds no results.json; give a folder that eval wrote"),
        (["--evals", "MODEL"], "MODEL: holds no results.json; give MODEL/eval"),
        (
            ["--evals", "EVAL", "--vendors", "Qwen2.5-0.5b"],
            "--vendors: 'Qwen2.5-0.5b' has no figure in baselines.yaml; did you mean Qwen2.5-0.5B",
        ),
        (
            ["--evals", "EVAL", "--vendors", "a,b,c,d,e,f,g"],
            "--vendors: 7 models, and the table has room for 6; name those that matter most",
        ),
        (["--evals", "EVAL", "--vendors", ","], "--vendors: ',' names no model; give names of configs/baselines.yaml"),
        (["--evals", " ,"], "report: nothing to report on; give --runs, --evals or both"),
        (["--evals", "MODEL/eval/results.json"], "MODEL/eval/results.json: is a file, not a folder; give MODEL/eval"),
        (["--evals", "MODEL/foreign"], "MODEL/foreign/results.json: is not a result of eval of this version; remove the folder"),
        (["--evals", "EVAL", "--beside", "MODEL/foreign"], "MODEL/foreign/results.json: is not a result of eval of this version"),
        (["--evals", "MODEL/proof/eval"], "MODEL/proof/parity.json: is not a proof written by export_hf; export again, or remove the file"),
        (["--evals", "EVAL", "--contamination", "MODEL"], "MODEL: is a folder; give the file: MODEL/contamination.json"),
        (["--evals", "EVAL", "--contamination", "MODEL/foreign/found.json"], "MODEL/foreign/found.json: is not a result of the command"),
        (["--runs", "MODEL/run"], "--runs: MODEL/run/metrics.csv has no columns step, tokens and loss; give the out_dir of a pretrain"),
        (["--evals", "EVAL", "--price_per_hour", "-1"], "price_per_hour: '-1' is not valid; input should be greater than or equal to 0"),
        (["--evals", "EVAL", "--contamination", "nowhere.json"], "nowhere.json: no such file; write one with the command contamination"),
    ],
)
def test_what_is_missing_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    write_evaluation(tmp_path / "eval")
    write_evaluation(tmp_path / "proof" / "eval", proof='{"checks": [')
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "results.json").write_text('{"complete": true, "rows": [{"label": "x"}], "model": {"path": "x"}}')
    (tmp_path / "foreign" / "found.json").write_text('{"benchmarks": [{"benchmark": "x"}], "text": {"tokens": 1}}')
    write_run(tmp_path / "run", rows=1, ledger=False)
    (tmp_path / "run" / "metrics.csv").write_text("epoch,loss\n1,2\n")
    given = [option.replace("EVAL", str(tmp_path / "eval")).replace("MODEL", str(tmp_path)) for option in options]
    assert main(["report", "--out_dir", str(tmp_path / "out"), *given]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {message.replace('MODEL', str(tmp_path))}") and not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_it_within_its_window(made: Path, tmp_path: Path, width: int) -> None:
    """Headless Chromium lays the page out, asks for nothing else, and reports what it measured in the title."""
    assert main(line(made, "--beside", str(made / "other"))) == 0
    measure = """<script>
    const wide = [...document.querySelectorAll('svg, h1, h2, .tile')].filter(e => e.getBoundingClientRect().right > innerWidth + 1).length;
    const small = [...document.querySelectorAll('svg')].filter(e => e.getBoundingClientRect().height < 80).length;
    const shown = [...document.querySelectorAll('svg text')].filter(e => e.getBoundingClientRect().width > 0).length;
    document.title = JSON.stringify({window: innerWidth, page: document.documentElement.scrollWidth, wide, small, shown,
        loaded: performance.getEntriesByType('resource').length});
    </script>"""
    page = tmp_path / "measured.html"
    page.write_text((made / "out/report.html").read_text().replace("</body>", f"{measure}</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [str(CHROMIUM), *flags, f"--screenshot={tmp_path / 'page.png'}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert found is not None, done.stderr[-500:]
    measured = json.loads(found[1])
    assert measured["page"] <= measured["window"], "nothing makes the page scroll sideways"
    assert (measured["wide"], measured["small"], measured["loaded"]) == (0, 0, 0) and measured["shown"] > 100


def test_what_went_wrong_on_the_way_is_told(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", rows=20, stepped_over=[[8, 12], [12, 16]]) / "metrics.csv"
    lines = path.read_text().splitlines()
    place = lines[0].split(",").index("skipped")
    cells = lines[5].split(",")
    cells[place] = "loss spike"
    path.write_text("\n".join([*lines[:5], ",".join(cells), *lines[6:], ""]))
    assert main(["report", "--runs", str(tmp_path / "run"), "--out_dir", str(tmp_path / "out")]) == 0
    for name in ("README.md", "report.html"):
        assert "loss spikes: none; 1 step skipped; went back 2 times." in (tmp_path / "out" / name).read_text(encoding="utf-8"), name


def test_steps_and_tokens_are_of_one_moment(tmp_path: Path) -> None:
    """A run that was killed has trained beyond its checkpoint; one that does not log each step ends after its last row."""
    killed, ended = (
        read_run(write_run(tmp_path / name, rows=1, step=step, tokens=tokens))
        for name, step, tokens in (("a", 4, 4_000), ("b", 12, 12_000))
    )
    assert (killed.step, killed.tokens, ended.step, ended.tokens) == (10, 10_000, 12, 12_000)
    assert main(["report", "--runs", str(tmp_path / "b"), "--out_dir", str(tmp_path / "out")]) == 0
    assert "12 steps, 12,000 tokens" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_runs_that_are_not_phases_of_one_model_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their tokens would be added up, in the card too."""
    first, other = (write_run(tmp_path / name, rows=10) for name in ("first", "other"))
    later = write_run(tmp_path / "later", rows=10, before=100_000)
    for runs in ((first, other), (first, first), (later, first)):
        assert main(["report", "--runs", ",".join(map(str, runs)), "--out_dir", str(tmp_path / "out")]) == 2
        assert f"error: --runs: {runs[1]} is no later phase of {runs[0]}; give the phases of one model" in capsys.readouterr().err
    assert main(["report", "--runs", f"{first},{later}", "--out_dir", str(tmp_path / "out")]) == 0
    for second, run in enumerate((other, first, later)):
        os.utime(run / "metrics.csv", (second, second))
    assert main(["report", "--runs", str(tmp_path), "--out_dir", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.endswith(f"did you mean {other},{first},{later}?\n"), "in the order of training"


def test_a_proof_is_that_of_the_evaluated_model(made: Path) -> None:
    assert main(line(made)) == 0
    proven = "computes what was trained"
    assert proven in (made / "out/report.html").read_text()
    for folder in (made / "hf", made / "import"):  # another export took its place; a model that was imported, beside its checkpoint
        write_evaluation(folder / "eval_final")
        (folder / "parity.json").write_text(json.dumps(PARITY | {"dtype": "float16"}))
    for evals in (f"{made}/hf/eval", f"{made}/import/eval_final", f"{made}/half,{made}/hf/eval"):
        assert main(["report", "--evals", evals, "--out_dir", str(made / "out")]) == 0
        assert proven not in (made / "out/report.html").read_text(), evals
        assert "The exported weights compute" not in (made / "out/README.md").read_text(), evals


@pytest.mark.parametrize("name", ["README.md", "report.html"])
def test_what_others_wrote_is_not_written_over(made: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main(line(made)) == 0 and main(line(made)) == 0, "its own it writes again"
    (made / "out" / name).write_text("the card of another model")
    assert main(line(made)) == 2
    message = f"error: --out_dir: {made / 'out' / name} is there, and not by report; give another folder, or move the file away"
    assert capsys.readouterr().err.splitlines()[-1] == message
    assert (made / "out" / name).read_text() == "the card of another model"


def test_a_license_is_what_the_person_says(made: Path) -> None:
    assert main(line(made)) == 0
    assert "license" not in yaml.safe_load((made / "out/README.md").read_text().split("---")[1])


def test_scores_of_another_model_than_the_last_run_are_said_to_be(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line(made)) == 0
    assert "another model" not in (made / "out/README.md").read_text() + (made / "out/report.html").read_text() + capsys.readouterr().err
    write_run(made / "longft", before=1_200_000, rows=12)
    said = (
        f"These scores are of another model than the training described here made: of {PARAMETERS:,} parameters, 64 tokens of context and "
        f"1,200,000 training tokens, and not of {PARAMETERS:,} parameters, 64 tokens of context and 1,320,000 training tokens."
    )
    both = ["--runs", f"{made}/pretrain,{made}/longft", "--evals", f"{made}/hf/eval", "--out_dir", str(made / "out")]
    assert main(["report", *both]) == 0
    assert f"**{said}**" in (made / "out/README.md").read_text() and said in (made / "out/report.html").read_text()
    assert capsys.readouterr().err.splitlines()[-1] == f"warning: --evals {made}/hf/eval: {said}"
