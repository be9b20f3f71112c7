"""The model card: README.md for the hub, with metadata and a ``model-index`` of the complete benchmarks."""

from __future__ import annotations

import re
from typing import Any

from minifoundation import __version__
from minifoundation.data.hub import language_of
from minifoundation.evaluate.tables import again, computed, table
from minifoundation.report.page import Content, architecture, corpus_in_words, tiles
from minifoundation.wording import counted

DATASETS = {
    "mmlu": "cais/mmlu",
    "mmlu_continuation": "cais/mmlu",
    "mmlu_redux": "fxmarty/mmlu-redux-2.0-ok",
    "mmlu_pro": "TIGER-Lab/MMLU-Pro",
    "mmlu_pro_mc": "TIGER-Lab/MMLU-Pro",
    "hellaswag": "Rowan/hellaswag",
    "arc_easy": "allenai/ai2_arc",
    "arc_challenge": "allenai/ai2_arc",
    "arc_challenge_mcf": "allenai/ai2_arc",
    "winogrande": "allenai/winogrande",
    "truthfulqa_mc2": "truthfulqa/truthful_qa",
    "piqa": "baber/piqa",
    "lambada_openai": "EleutherAI/lambada_openai",
    "gsm8k": "openai/gsm8k",
    "gsm8k_direct": "openai/gsm8k",
    "hendrycks_math": "EleutherAI/hendrycks_math",
    "minerva_math": "EleutherAI/hendrycks_math",
    "humaneval": "openai/openai_humaneval",
    "mbpp": "google-research-datasets/mbpp",
}
"""The hub's name of each benchmark's data; a score without one is left out of the index."""


def card(content: Content, *, license: str | None) -> str:
    """Return the text of ``README.md``: YAML metadata between dashes, then Markdown."""
    parts = [f"# {content.name}", _summary(content)]
    if content.settings is not None:
        parts += ["## Architecture", _rows(architecture(content.settings))]
    if content.runs:
        parts += ["## Training", _training(content)]
    main = content.main
    if main is not None:
        score = "Percent, ± the standard error of the mean over documents; prompts that were longer than the context lost their beginning."
        parts += ["## Benchmarks", score, table(main.outcomes, content.baselines)]
        if not main.facts["complete"]:
            parts.append("**This evaluation was stopped before its end: tasks are missing.**")
        if content.apart:
            parts.append(f"**{content.apart}**")
        if main.is_sample:
            parts.append("**Where n is smaller than the benchmark, not all documents were read: such a score compares with nothing.**")
        if content.contamination is not None:
            parts.append(_contamination(content))
        if main.facts["sandbox"]:
            parts.append(f"Programs written by the model ran under: {main.facts['sandbox']}.")
        facts = main.facts
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        parts.append(f"Computed in {computed(facts['model'])}. To measure them again ({versions}):\n\n    {again(facts)}")
    parts += ["## Use", _use(content), "## Limits", LIMITS]
    parts.append(f"Written by mini-foundation-llm {__version__}; the plots are in `report.html`.")
    return f"---\n{_metadata(content, license)}---\n\n" + "\n\n".join(parts) + "\n"


LIMITS = (
    "A base model: it continues text, it was not trained to follow instructions or to refuse. It repeats what its training text says, "
    "errors and prejudices included. Scores near chance are no knowledge; a figure marked ≠ does not compare."
)


def _metadata(content: Content, license: str | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type=DATASETS[outcome.request.row.name],
            dataset_name=outcome.label,
            dataset_config=outcome.label,  # else the hub puts two ways of measuring on one data set together
            metric_type=outcome.metric.split(",")[0],
            metric_name=outcome.protocol,
            metric_value=round(outcome.scale * outcome.score, 2),
        )
        for outcome in (content.main.outcomes if content.main else ())
        if outcome.score is not None and not outcome.is_sample and outcome.request.row.name in DATASETS
    ]
    read = [entry.corpus.get("hub") for entry in content.runs[-1].ledger] if content.runs else []
    known = dict.fromkeys(name for corpus in read if corpus and (name := hub_name(corpus)))
    data = ModelCardData(
        language=_language(content),
        license=license,
        library_name="transformers",
        pipeline_tag="text-generation",
        model_name=content.name,
        datasets=list(known) or None,
        eval_results=results or None,
    )
    return str(data.to_yaml()) + "\n"


def _language(content: Content) -> str | None:
    """Return the language of all that the model has read; None where that of a part is not known."""
    if not content.runs or content.imported_from is not None:
        return None
    known = {language_of(str(entry.corpus.get("hub"))) for entry in content.runs[-1].ledger}
    return known.pop() if len(known) == 1 else None


def hub_name(corpus: str) -> str | None:
    """Return the data set of the hub as its metadata wants it, org/name, from what a ledger calls it; None for what is no data set."""
    found = re.fullmatch(r"(?:hf://datasets/)?([^/:@]+/[^/:@]+)(?:@[^/]*)?(/.*)?", corpus)
    return found[1] if found and (found[2] is None or corpus.startswith("hf://")) else None


def _summary(content: Content) -> str:
    said = "; ".join(f"{value} {label}" for value, label in tiles(content))
    summary = f"A decoder language model in {'Qwen3' if _qk(content) else 'Llama'}'s layout: {said}."
    return f"{summary} {content.origin}" if content.origin else summary


def _qk(content: Content) -> bool:
    return content.settings is not None and content.settings.model.qk_norm


def _training(content: Content) -> str:
    lines = []
    for run in content.runs:
        bits, loss = run.last("held_out_bits_per_byte"), run.last("loss")
        train = run.settings.train
        last = "no finite loss" if loss is None else f"last loss {loss:.3f}"
        held = "" if bits is None else f", {bits:.3f} bits per byte on held-out text"
        lines.append(
            f"* {run.phase}: {run.tokens:,} tokens in {counted(run.step, 'step')} of {run.tokens // max(1, run.step):,}, "
            f"rows of {train.seq_len:,}, peak learning rate {train.lr:g} ({train.schedule}), {train.precision}; "
            f"{last}{held}; {run.trouble}."
        )
    ledger = content.runs[-1].ledger
    if ledger:
        header = ["source", "corpus", "phase", "share", "tokens", "epochs"]
        rows = [
            [
                f"{e.source} ({e.part})" if e.part else e.source,
                corpus_in_words(e.corpus),
                e.phase,
                f"{e.share:.1%}",
                f"{e.tokens:,}",
                "under 1" if e.epochs is None else f"{e.epochs:.2f}",
            ]
            for e in ledger
        ]
        lines += ["", _table(header, rows)]
    return "\n".join(lines)


def _contamination(content: Content) -> str:
    header = ["benchmark", "dirty (13-grams)", "clean items", "dirty items", "dirty (8-grams)"]
    rows = []
    for line in content.lines:
        if not line.separated:
            continue
        long, short = line.separated[13], line.separated[8]
        cells = [f"{100 * split.score:.1f} ({split.n:,})" if split.score is not None else "" for split in (long.clean, long.dirty)]
        rows.append([line.outcome.label, f"{long.share:.2%}", *cells, f"{short.share:.2%}"])
    tokens = content.contamination["text"]["tokens"] if content.contamination else 0
    said = f"Test items of which 13 (or 8) words in a row stand in the {tokens:,} training tokens searched, and the score without them:"
    return f"{said}\n\n{_table(header, rows)}" if rows else ""


def _use(content: Content) -> str:
    proof = ""
    if content.parity is not None:
        worst = max((check["difference"] for check in content.parity["checks"]), default=0.0)
        proof = f"\n\nThe exported weights compute what was trained: largest difference of logits {worst:.1e} (`parity.json`)."
    code = (
        "    from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        '    folder = "path/to/the/model"\n'
        "    model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "    tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        '    print(tokenizer.decode(model.generate(**tokenizer("The ship", return_tensors="pt"), max_new_tokens=50)[0]))'
    )
    return code + proof


def _rows(pairs: list[tuple[str, str]]) -> str:
    return _table(["", ""], [list(pair) for pair in pairs])


def _table(header: list[str], rows: list[list[Any]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [header, ["---"] * len(header), *rows])
