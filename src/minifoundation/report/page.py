"""The report as one HTML page that needs no network: tiles, tables, plots."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel

from minifoundation import __version__
from minifoundation.config import RunConfig, changed
from minifoundation.errors import UserError
from minifoundation.evaluate.baselines import Baselines
from minifoundation.evaluate.mirror import sha256
from minifoundation.evaluate.tables import again, computed
from minifoundation.model.size import n_parameters
from minifoundation.report import evaluations, plots
from minifoundation.report.evaluations import LEGEND, Evaluation, Line
from minifoundation.report.runs import Run
from minifoundation.wording import counted, short_bytes, short_count

CURVES = (
    ("loss", "Training loss", "nats a token"),
    ("held_out_bits_per_byte", "Held-out text", "bits a byte"),
    ("lr", "Learning rate", ""),
    ("grad_norm", "Gradient norm", ""),
    ("tokens_per_second", "Speed", "tokens a second"),
    ("peak_memory_gib", "Peak memory", "GiB"),
)


@dataclass(frozen=True)
class Cost:
    """What an hour costs and takes, where the person said so."""

    per_hour: float | None
    watts: float | None


@dataclass(frozen=True)
class Content:
    """Everything the report is made from."""

    name: str
    runs: tuple[Run, ...]
    evaluations: tuple[Evaluation, ...]
    baselines: Baselines
    columns: tuple[str, ...]
    """Models beside ours."""
    contamination: dict[str, Any] | None
    parity: dict[str, Any] | None
    cost: Cost

    @property
    def settings(self) -> RunConfig | None:
        return self.runs[-1].settings if self.runs else None

    @property
    def main(self) -> Evaluation | None:
        """The evaluation whose table is shown: the first."""
        return self.evaluations[0] if self.evaluations else None

    @property
    def lines(self) -> list[Line]:
        return evaluations.lines(self.main, self.baselines, self.columns, self.contamination) if self.main else []

    @property
    def parameters(self) -> int | None:
        if self.settings is not None:
            return n_parameters(self.settings.model)
        return self.main.facts["model"]["parameters"] if self.main else None

    @property
    def tokens(self) -> int:
        """Training tokens of all runs, and of the phases before them that are not given; of an imported model since then."""
        return self.runs[0].before + sum(run.tokens for run in self.runs) if self.runs else 0

    @property
    def imported_from(self) -> str | None:
        """The folder of the weights that training began from, where they came from elsewhere."""
        return self.runs[-1].imported_from if self.runs else self.main.imported_from if self.main else None

    @property
    def origin(self) -> str:
        """What is to be said of an imported model, else nothing."""
        if self.imported_from is None:
            return ""
        return (
            f"Training here began from the weights of {self.imported_from}, which came from elsewhere: what those had been trained on, "
            "and on how many tokens, is not known here and in none of the figures."
        )

    @property
    def apart(self) -> str:
        """What is to be said where the scores are those of another model than the last run's, else nothing."""
        if self.main is None or self.settings is None:
            return ""
        model, tokens = self.main.facts["model"], self.main.tokens
        theirs = [model["parameters"], model["max_length"], self.tokens if tokens is None else tokens]
        ours = [self.parameters, self.settings.model.max_seq_len, self.tokens]
        if theirs[:2] == ours[:2] and abs(theirs[2] - self.tokens) <= 0.01 * self.tokens:
            return ""
        said = [
            f"{count:,} parameters, {context:,} tokens of context and {read:,} training tokens" for count, context, read in (theirs, ours)
        ]
        return f"These scores are of another model than the training described here made: of {said[0]}, and not of {said[1]}."

    @property
    def hours(self) -> float:
        return sum(run.hours for run in self.runs)


def tiles(content: Content) -> list[tuple[str, str]]:
    """Return the figures at the top: value and what it is."""
    made = []
    if content.parameters:
        made.append((short_count(content.parameters), "parameters"))
    if content.runs:
        made.append((short_count(content.tokens), plots.tokens_of(content.imported_from)))
        bits = content.runs[-1].last("held_out_bits_per_byte")
        if bits is not None:
            made.append((f"{bits:.3f}", "bits a byte, held-out"))
        made.append((f"{content.settings.model.max_seq_len:,}" if content.settings else "", "tokens of context"))
        hours = f"{content.hours:,.1f} h" if content.hours >= 0.1 else f"{content.hours * 60:,.1f} min"
        made.append((hours, "training of the last phases" if content.runs[0].before else "training"))
        if content.cost.watts is not None:
            made.append((f"{content.hours * content.cost.watts / 1000:,.2f} kWh", f"at {content.cost.watts:,.0f} W"))
        if content.cost.per_hour is not None:
            made.append((f"{content.hours * content.cost.per_hour:,.2f}", f"cost at {content.cost.per_hour:g} an hour"))
    return made


def architecture(settings: RunConfig) -> list[tuple[str, str]]:
    """Return the lines of the architecture table."""
    model = settings.model
    rope = "" if model.rope.scaling == "none" else f", {model.rope.scaling} scaling by {model.rope.factor:g}"
    return [
        ("layout", "Qwen3 (QK-norm)" if model.qk_norm else "Llama"),
        ("blocks, width", f"{model.n_layer}, {model.d_model:,}"),
        ("heads", f"{model.n_head} query, {model.n_kv_head} key-value, {model.head_width} wide"),
        ("MLP", f"SwiGLU, {model.d_ff:,} wide"),
        ("vocabulary", f"{model.vocab_size:,}, {'tied' if model.tie_embeddings else 'untied'}"),
        ("positions", f"RoPE θ = {model.rope.theta:,.0f}{rope}"),
        ("context", f"{model.max_seq_len:,} tokens, pretrained at {model.original_seq_len:,}"),
        ("parameters", f"{n_parameters(model):,}"),
    ]


def corpus_in_words(corpus: Mapping[str, Any]) -> str:
    """Return what tells a corpus of the ledger from others: the data set of the hub with its revision, or how many files of one's own."""
    if "hub" in corpus:
        subset = f" ({corpus['subset']})" if corpus.get("subset") else ""
        return f"{corpus['hub']}{subset} at {str(corpus.get('revision'))[:12]}"
    if "files" not in corpus:
        return ""
    count = counted(corpus["files"], "file")
    size = "" if corpus.get("bytes") is None else f", {short_bytes(corpus['bytes'])}"
    return f"{count}{size}, sha256 {corpus['sha256'][:12]}"


def html(content: Content) -> str:
    """Return the page."""
    main = content.main
    curves = [plots.curve(content.runs, column, title, unit, log=column == "grad_norm") for column, title, unit in CURVES]
    shown = evaluations.points(main, content.baselines, content.columns, content.name) if main else []
    environment = Environment(
        loader=PackageLoader("minifoundation.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": _percent, "count": lambda value: f"{value:,}", "counted": counted, "corpus": corpus_in_words}
    template = environment.get_template("page.html.j2")
    return template.render(
        version=__version__,
        content=content,
        tiles=tiles(content),
        architecture=architecture(content.settings) if content.settings else [],
        curves=[svg for svg in curves if svg],
        main=main,
        tokens_of=plots.tokens_of(content.imported_from),
        computed=computed(main.facts["model"]) if main else "",
        again=again(main.facts) if main else "",
        lines=content.lines,
        legend=LEGEND,
        against=plots.against(shown, content.name),
        over_tokens=plots.over_tokens(evaluations.over_tokens(content.evaluations, content.runs), content.imported_from),
        settings=[(run.folder.name, changed(run.settings)) for run in content.runs],
        hashes=json.dumps(main.facts["model"]["sha256"], indent=1) if main else "",
        worst=max((check["difference"] for check in content.parity["checks"]), default=0.0) if content.parity else None,
    )


def _percent(share: float | None, digits: int = 1) -> str:
    return "" if share is None else f"{100 * share:.{digits}f}"


def read_parity(evaluation: Evaluation) -> dict[str, Any] | None:
    """Return what is shown of the ``parity.json`` that lay in the evaluated folder; None without, or where another lies there now.

    Raises:
        UserError: it is no proof, or damaged.
    """
    model = evaluation.facts["model"]
    for path in (Path(model["path"]) / "parity.json", evaluation.folder.parent / "parity.json"):
        if path.is_file() and sha256(path) == model["sha256"].get(path.name):
            try:
                return _Proof.model_validate_json(path.read_text(encoding="utf-8")).model_dump()
            except ValueError:
                raise UserError(str(path), "is not a proof written by export_hf", "export again, or remove the file") from None
    return None


class _Check(BaseModel):
    difference: float


class _Proof(BaseModel):
    """What is shown of ``parity.json``."""

    checks: list[_Check]
    tolerance: float
    compared: str
