"""The harness as a whole: equal to plain lm-eval, 1.0 for a model that knows the answers, chance for one that knows nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from minifoundation.evaluate.requests import read_tasks
from minifoundation.evaluate.results import Outcome
from tests.evaluate.tiny import BUNDLED, WHOLE, loaded

if TYPE_CHECKING:
    from minifoundation.evaluate.model import Model

whole = pytest.mark.skipif(not WHOLE.is_dir(), reason=f"no complete benchmarks at {WHOLE}")
LIKELIHOODS = "arc_easy,arc_challenge:3,arc_challenge_mcf:3,hellaswag:2,piqa,winogrande:2,lambada_openai,truthfulqa_mc2,mmlu_continuation"


def outcomes(model: Model, tasks: str, *, limit: int, data_dir: Path = WHOLE, code: bool = False) -> list[Outcome]:
    from minifoundation.evaluate import harness

    requests = read_tasks(tasks)
    found = harness.run(model, harness.task_manager(requests), requests, limit=limit, data_dir=data_dir, code=code)
    return [outcome for one in found for outcome in one]


def plain_samples(folder: Path, tasks: str, *, limit: int, data_dir: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return the samples of lm-eval's own HFLM, a row at a time, by label."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    from minifoundation.evaluate import harness

    requests = read_tasks(tasks)
    manager = harness.task_manager(requests)
    model = HFLM(pretrained=str(folder), device="cpu", dtype="float32", softmax_dtype="float32", batch_size=1)
    found = {}
    for request in requests:
        tasks_of = harness.loaded_tasks(manager, request, data_dir=data_dir)
        found[request.label] = lm_eval.evaluate(model, tasks_of, limit=limit, bootstrap_iters=0)["samples"]
    return found


@pytest.mark.parametrize(
    ("tasks", "limit", "data_dir"),
    [
        ("arc_easy,hellaswag:0,piqa", 12, BUNDLED),
        pytest.param(LIKELIHOODS + ",mmlu", 3, WHOLE, marks=[pytest.mark.slow, whole]),
    ],
    ids=["bundled", "whole"],
)
def test_log_likelihoods_and_choices_are_those_of_plain_lm_eval(
    tiny: Model, tiny_folder: Path, tasks: str, limit: int, data_dir: Path
) -> None:
    theirs = plain_samples(tiny_folder, tasks, limit=limit, data_dir=data_dir)
    compared = 0
    for outcome in outcomes(tiny, tasks, limit=limit, data_dir=data_dir):
        assert outcome.not_run is None, outcome.not_run
        for task, samples in theirs[outcome.label].items():
            ours = [item for item in outcome.items if item["task"] == task]
            assert len(ours) == len(samples) > 0
            for item, sample in zip(ours, samples, strict=True):
                expected = [response[0][0] for response in sample["resps"]]
                assert item["log_likelihoods"] == pytest.approx(expected, abs=1e-3)
                assert item["score"] == pytest.approx(sample[outcome.metric.split(",")[0]], abs=1e-3)
                compared += 1
    assert compared >= 3 * limit


@whole
@pytest.mark.parametrize(
    ("task", "limit", "answer"),
    [
        ("gsm8k_direct", 20, lambda doc: f" {doc['answer'].split('####')[1].strip()}"),
        ("gsm8k", 20, lambda doc: f" {doc['answer']}"),
        ("hendrycks_math", 20, lambda doc: f" ${_boxed(doc['solution'])}$"),
        ("humaneval", 10, lambda doc: doc["canonical_solution"]),
        ("mbpp", 10, lambda doc: doc["code"]),
        pytest.param("mmlu_pro", 3, lambda doc: f" The answer is ({doc['answer']}).", marks=pytest.mark.slow),
        pytest.param(
            "minerva_math",
            5,
            lambda doc: f"\nFinal Answer: The final answer is ${_boxed(doc['solution'])}$. I hope it is correct.",
            marks=pytest.mark.slow,
        ),
        pytest.param("humaneval", 0, lambda doc: doc["canonical_solution"], marks=pytest.mark.slow),
        pytest.param("mbpp", 0, lambda doc: doc["code"], marks=pytest.mark.slow),
        pytest.param("hendrycks_math", 100, lambda doc: f" ${_boxed(doc['solution'])}$", marks=pytest.mark.slow),
    ],
)
def test_a_model_that_knows_the_answers_scores_one(
    tiny: Model, monkeypatch: pytest.MonkeyPatch, task: str, limit: int, answer: Callable[[dict[str, Any]], str]
) -> None:
    monkeypatch.setattr(tiny, "generate_until", lambda requests, disable_tqdm=False: [answer(request.doc) for request in requests])
    (outcome,) = outcomes(tiny, task, limit=limit, code=True)
    assert outcome.not_run is None, outcome.not_run
    least = 0.995 if "hendrycks" in task else 1.0  # lm-eval compares strings: a few answers of MATH are not equal to themselves
    missed = [item for item in outcome.items if not item["score"]]
    assert outcome.score is not None and outcome.score >= least, (outcome.score, missed[:3])
    monkeypatch.setattr(tiny, "generate_until", lambda requests, disable_tqdm=False: ["" for _ in requests])
    assert outcomes(tiny, task, limit=limit or 20, code=True)[0].score == 0, "and one that writes nothing scores 0"


def _boxed(solution: str) -> str:
    from lm_eval.tasks.hendrycks_math.utils import last_boxed_only_string, remove_boxed

    return str(remove_boxed(last_boxed_only_string(solution)))


@whole
@pytest.mark.slow
def test_a_model_that_knows_nothing_scores_chance(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token as likely as any other, with a little noise to break the ties that accuracy would give to the first choice."""
    import numpy as np

    model = loaded(tiny_folder)
    random = np.random.default_rng(0)

    def uniform(requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return [(-5.0 * len(request.args[1]) + random.normal(0, 1e-3), False) for request in requests]

    monkeypatch.setattr(model, "loglikelihood", uniform)
    for outcome in outcomes(model, "arc_easy,arc_challenge_mcf:0,piqa,winogrande:0,lambada_openai", limit=300):
        chance = outcome.request.row.chance
        assert outcome.score is not None and outcome.stderr is not None and chance is not None, outcome.not_run
        assert math.isclose(outcome.score, chance, abs_tol=4 * outcome.stderr + 1e-3), (outcome.label, outcome.score, chance)
