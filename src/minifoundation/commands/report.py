"""``report``: one HTML page and a model card from run folders and evaluations."""

from __future__ import annotations

import sys

from minifoundation.checkpoint import write_whole
from minifoundation.config import ReportOptions
from minifoundation.errors import UserError
from minifoundation.evaluate.baselines import Baselines
from minifoundation.evaluate.contamination import read_findings
from minifoundation.evaluate.tables import FIGURES_BESIDE, columns

PAGE, CARD = "report.html", "README.md"
SIGNED = "Written by mini-foundation-llm"
"""Stands in both: what is without it is another's, and not written over."""


def report(options: ReportOptions) -> None:
    """Write ``report.html`` and ``README.md`` to ``options.out_dir``.

    Raises:
        UserError: nothing to report on, a folder that is no run or no evaluation, or an unknown vendor.
    """
    if not options.runs and not options.evals:
        raise UserError("report", "nothing to report on", "give --runs, --evals or both")
    for path in (options.out_dir / PAGE, options.out_dir / CARD):
        if path.exists() and SIGNED.encode() not in path.read_bytes():
            raise UserError("--out_dir", f"{path} is there, and not by report", "give another folder, or move the file away")
    try:
        from minifoundation.report.card import card
        from minifoundation.report.evaluations import read_evaluation
        from minifoundation.report.page import Content, Cost, html, read_parity
        from minifoundation.report.runs import read_run, refuse_unrelated
    except ImportError as error:
        raise UserError("report", f"needs a package that is not installed ({error})", "pip install -e '.[eval]'") from None
    runs = tuple(read_run(folder) for folder in options.runs)
    refuse_unrelated(runs)
    evaluations = tuple(read_evaluation(folder) for folder in options.evals)
    baselines = Baselines.load(reruns=options.beside)
    if options.vendors is not None:
        names = [name.strip() for name in options.vendors.split(",") if name.strip()]
        if not names:
            raise UserError("--vendors", f"{options.vendors!r} names no model", "give names of configs/baselines.yaml, or leave it out")
        if len(names) > FIGURES_BESIDE:
            raise UserError("--vendors", f"{len(names)} models, and the table has room for {FIGURES_BESIDE}", "name those that matter most")
        baselines = baselines.with_columns(names)
    place = options.contamination or (runs[-1].folder / "contamination.json" if runs else None)
    contamination = read_findings(place) if place is not None and (options.contamination or place.exists()) else None
    content = Content(
        name=options.name or (evaluations[0].name if evaluations else runs[-1].folder.name),
        runs=runs,
        evaluations=evaluations,
        baselines=baselines,
        columns=tuple(columns(evaluations[0].outcomes, baselines)) if evaluations else (),
        contamination=contamination,
        parity=read_parity(evaluations[0]) if evaluations else None,
        cost=Cost(options.price_per_hour, options.watts),
    )
    if content.apart:
        print(f"warning: --evals {evaluations[0].folder}: {content.apart}", file=sys.stderr)
    options.out_dir.mkdir(parents=True, exist_ok=True)
    for name, text in ((PAGE, html(content)), (CARD, card(content, license=options.license))):
        write_whole(options.out_dir / name, text.encode())
        print(options.out_dir / name)
