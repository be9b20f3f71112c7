"""lm-eval through our harness, against the plain forward of transformers and arithmetic by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import pytest

from minifoundation.errors import UserError
from minifoundation.evaluate.baselines import Baselines
from minifoundation.evaluate.protocols import ROWS
from minifoundation.evaluate.requests import Request, read_tasks
from minifoundation.evaluate.results import Outcome
from minifoundation.evaluate.tables import table
from tests.evaluate.tiny import BUNDLED, WHOLE, loaded, write_items, write_tiny_model

if TYPE_CHECKING:
    from minifoundation.evaluate.model import Model


def evaluated(model: Model, tasks: str, *, limit: int = 0, data_dir: Path | None = BUNDLED, code: bool = False) -> list[Outcome]:
    from minifoundation.evaluate import harness

    requests = read_tasks(tasks)
    found = harness.run(model, harness.task_manager(requests), requests, limit=limit, data_dir=data_dir, code=code)
    return [outcome for outcomes in found for outcome in outcomes]


def log_likelihood(folder: Path, context: str, continuation: str) -> float:
    """Return the sum of log-probabilities of ``continuation`` after ``<s>`` and ``context``, one request at a time, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = tokenizer(context).input_ids
    whole = tokenizer(context + continuation).input_ids
    assert prompt[0] == tokenizer.bos_token_id and whole[: len(prompt)] == prompt
    with torch.no_grad():
        log_probabilities = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(float(log_probabilities[place - 1, whole[place]]) for place in range(len(prompt), len(whole)))


def test_log_likelihoods_equal_the_plain_forward(tiny: Model, tiny_folder: Path) -> None:
    for outcome in evaluated(tiny, "arc_easy,piqa", limit=2):
        for sample in outcome.samples[outcome.label]:
            for (context, continuation), response in zip(sample["arguments"], sample["resps"], strict=True):
                assert response[0][0] == pytest.approx(log_likelihood(tiny_folder, context, continuation), abs=2e-4)


def test_templates_are_compiled_and_data_sets_processed_once(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import lm_eval.utils

    environment, compiled, processed = lm_eval.utils.env, list[str](), list[datasets.Dataset]()
    compile_template, processing = environment.compile, datasets.Dataset.map

    def counted(source: str, *rest: Any, **options: Any) -> Any:
        compiled.append(source)
        return compile_template(source, *rest, **options)

    def counted_processing(data: datasets.Dataset, *rest: Any, **options: Any) -> Any:
        processed.append(data)
        return processing(data, *rest, **options)

    monkeypatch.setattr(environment, "compile", counted)
    monkeypatch.setattr(datasets.Dataset, "map", counted_processing)
    evaluated(tiny, "hellaswag:0", limit=8)
    assert len(processed) == 1
    assert all(compiled.count(template) <= 2 for template in compiled), "where a task is built, and where it is evaluated"
    assert "from_string" not in vars(environment), "nothing of it stays in lm-eval"


def test_accuracies_and_standard_error_by_hand(tiny: Model) -> None:
    (outcome,) = evaluated(tiny, "arc_easy")
    samples = outcome.samples["arc_easy"]
    assert outcome.n == len(samples) == 100, "limit 0 is all"
    plain, normalised = [], []
    for sample in samples:
        likelihoods = [response[0][0] for response in sample["resps"]]
        lengths = [len(text) for text in sample["doc"]["choices"]["text"]]
        gold = sample["doc"]["choices"]["label"].index(sample["doc"]["answerKey"])
        plain.append(float(likelihoods.index(max(likelihoods)) == gold))
        ratios = [value / length for value, length in zip(likelihoods, lengths, strict=True)]
        normalised.append(float(ratios.index(max(ratios)) == gold))
    assert outcome.score == pytest.approx(fmean(normalised))
    assert outcome.raw["results"]["arc_easy"]["acc,none"] == pytest.approx(fmean(plain))
    assert outcome.stderr == pytest.approx(stdev(normalised) / math.sqrt(100))
    assert plain != normalised, "the two differ somewhere, else this test is blind"
    assert (outcome.metric, outcome.protocol, outcome.truncated, outcome.requests) == ("acc_norm,none", "0-shot, acc_norm", 0, 400)


def test_the_limit_takes_the_first_documents(tiny: Model) -> None:
    (outcome,) = evaluated(tiny, "piqa", limit=3)
    assert outcome.n == 3


def test_progress_bars_say_of_which_benchmark_they_are(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import lm_eval.api.task

    before = lm_eval.api.task.tqdm
    evaluated(tiny, "piqa", limit=2)
    monkeypatch.setattr(tiny, "_model_generate", lambda context, **_: context)
    write_items(tmp_path / "openai/gsm8k/main", "train", [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(9)])
    write_items(tmp_path / "openai/gsm8k/main", "test", [{"question": "1?", "answer": "#### 1"}])
    evaluated(tiny, "gsm8k", data_dir=tmp_path)
    said = capsys.readouterr().err
    for bar in ("piqa: prompts", "piqa: log-likelihoods", "gsm8k: prompts", "gsm8k: Running generate_until requests"):
        assert f"{bar}:   0%" in said, bar
    monkeypatch.setattr(type(tiny), "silent", True)
    evaluated(tiny, "piqa", limit=2)
    evaluated(tiny, "gsm8k", data_dir=tmp_path)
    assert "0%" not in capsys.readouterr().err
    assert lm_eval.api.task.tqdm is before


def test_the_batch_size_changes_nothing(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def likelihoods() -> list[float]:
        (outcome,) = evaluated(tiny, "arc_easy", limit=10)
        return [response[0][0] for sample in outcome.samples["arc_easy"] for response in sample["resps"]]

    by_memory = likelihoods()
    monkeypatch.setattr(tiny, "fixed_rows", 1)
    assert likelihoods() == pytest.approx(by_memory, abs=1e-4)


def test_requests_longer_than_the_context_are_counted(tmp_path: Path) -> None:
    short = loaded(write_tiny_model(tmp_path, context=48))
    (outcome,) = evaluated(short, "arc_easy", limit=20)
    lengths = [
        len(short.tokenizer(context + continuation).input_ids)
        for sample in outcome.samples["arc_easy"]
        for context, continuation in sample["arguments"]
    ]
    assert outcome.truncated == sum(length > 48 + 1 for length in lengths)
    assert 0 < outcome.truncated < outcome.requests == len(lengths)


def arc_items(count: int, subject: str = "stone") -> list[dict[str, Any]]:
    choices = {"text": ["red", "green", "blue", "white"], "label": ["A", "B", "C", "D"]}
    return [
        {"id": str(i), "question": f"Which colour is {subject} {i}?", "choices": choices, "answerKey": "ABCD"[i % 4]} for i in range(count)
    ]


def test_examples_in_the_prompt_come_from_the_train_split(tiny: Model, tmp_path: Path) -> None:
    folder = tmp_path / "allenai/ai2_arc/ARC-Easy"
    write_items(folder, "test", arc_items(4))
    write_items(folder, "train", arc_items(9, "flower"))
    write_items(folder, "validation", arc_items(2, "cloud"))
    (outcome,) = evaluated(tiny, "arc_easy:3", data_dir=tmp_path)
    assert (outcome.shots, outcome.label, outcome.n) == (3, "arc_easy:3", 4)
    prompts = [sample["arguments"][0][0] for sample in outcome.samples["arc_easy"]]
    assert all(prompt.count("flower") == 3 and prompt.count("stone") == 1 and "cloud" not in prompt for prompt in prompts)
    again = evaluated(tiny, "arc_easy:3", data_dir=tmp_path)[0].samples["arc_easy"]
    assert [sample["arguments"][0][0] for sample in again] == prompts, "the examples are drawn by a fixed seed"


def test_a_task_without_data_says_so_and_the_others_run(tiny: Model) -> None:
    outcomes = evaluated(tiny, "winogrande,arc_easy:2,piqa", limit=2)
    assert [outcome.not_run is None for outcome in outcomes] == [False, False, True]
    assert str(outcomes[0].not_run).startswith(f"{BUNDLED}/allenai/winogrande/winogrande_xl: no such folder in --data_dir")
    assert str(outcomes[1].not_run).startswith(f"{BUNDLED}/allenai/ai2_arc/ARC-Easy/train.parquet: no such file in --data_dir")


def test_a_data_set_that_is_nowhere_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from huggingface_hub import constants

    from minifoundation.evaluate.mirror import read_dataset

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"data set nobody/nothing \(easy\): not cached and not reachable .*; .*--data_dir") as error:
        read_dataset(None, "nobody/nothing", "easy")
    assert "\n" not in str(error.value)


def test_an_unreachable_hub_switches_to_offline_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from huggingface_hub import constants

    from minifoundation.evaluate.mirror import go_offline_unless_reachable

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    go_offline_unless_reachable()
    assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE


def test_an_edited_mirror_is_read_anew(tmp_path: Path) -> None:
    from minifoundation.evaluate.mirror import read_dataset

    write_items(tmp_path / "org/name/default", "test", [{"text": "old"}])
    assert read_dataset(tmp_path, "org/name", None)["test"]["text"][:] == ["old"]
    write_items(tmp_path / "org/name/default", "test", [{"text": "new"}])
    assert read_dataset(tmp_path, "org/name", None)["test"]["text"][:] == ["new"]


def outcome_of(name: str, leaves: dict[str, list[float]], metric: str) -> Outcome:
    row = ROWS[name]
    results = {leaf: {f"{metric},none": fmean(values)} for leaf, values in leaves.items()}
    logged = {"filter": "none", "doc_id": 0, "doc_hash": "", "target": "", "resps": [[(-1.0, True)]]}
    samples = {leaf: [logged | {metric: value} for value in values] for leaf, values in leaves.items()}
    return Outcome(Request(row, row.shots), name, raw={"results": results}, samples=samples)


def test_mmlu_is_the_plain_mean_of_its_subjects_and_math_weighs_by_documents() -> None:
    from minifoundation.evaluate.harness import _score

    leaves = {"small": [1.0, 0.0], "large": [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0]}
    errors = [stdev(values) / math.sqrt(len(values)) for values in leaves.values()]
    macro = outcome_of("mmlu", leaves, "acc")
    assert _score(macro, "acc")
    assert macro.score == pytest.approx((0.5 + 0.25) / 2) and macro.n == 10
    assert macro.stderr == pytest.approx(math.hypot(*errors) / 2)
    micro = outcome_of("hendrycks_math", leaves, "exact_match")
    assert _score(micro, "exact_match")
    assert micro.score == pytest.approx(3 / 10)
    assert micro.stderr == pytest.approx(math.hypot(0.2 * errors[0], 0.8 * errors[1]))


def test_a_metric_that_is_no_mean_has_no_standard_error() -> None:
    from minifoundation.evaluate.harness import _score

    outcome = outcome_of("arc_easy", {"arc_easy": [1.0, 2.0, 3.0]}, "acc_norm")
    outcome.raw["results"]["arc_easy"]["acc_norm,none"] = math.e
    assert _score(outcome, "acc_norm")
    assert outcome.score == math.e and outcome.stderr is None


def code_mirror(folder: Path) -> Path:
    problem = {
        "task_id": "T/0",
        "prompt": "def f():\n",
        "canonical_solution": "    return 1\n",
        "test": "def check(c):\n    assert c() == 1\n",
    }
    write_items(folder / "openai/openai_humaneval/openai_humaneval", "test", [problem | {"entry_point": "f"}])
    return folder


def test_programs_are_run_only_when_allowed(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = code_mirror(tmp_path)
    (refused,) = evaluated(tiny, "humaneval", data_dir=mirror)
    assert refused.not_run == "needs --allow_code_exec"
    monkeypatch.setattr(tiny, "generate_until", lambda requests, disable_tqdm=False: ["    return 1\n" for _ in requests])
    (right,) = evaluated(tiny, "humaneval", data_dir=mirror, code=True)
    assert (right.score, right.n, right.metric) == (1.0, 1, "pass@1,none")
    monkeypatch.setattr(tiny, "generate_until", lambda requests, disable_tqdm=False: ["    return 2\n" for _ in requests])
    (wrong,) = evaluated(tiny, "humaneval", data_dir=mirror, code=True)
    assert wrong.score == 0.0


def test_generation_that_does_not_fit_the_memory_is_done_in_smaller_batches(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from lm_eval.api.instance import Instance

    generate, rows = tiny._model_generate, []

    def limited(context: Any, **options: Any) -> Any:
        rows.append(len(context))
        if len(context) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(context, **options)

    options = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
    requests = [Instance("generate_until", {}, (f"How much is {i}?", options), i) for i in range(6)]
    alone = [tiny.generate_until([request], disable_tqdm=True)[0] for request in requests]
    monkeypatch.setattr(tiny, "_model_generate", limited)
    assert tiny.generate_until(requests, disable_tqdm=True) == alone
    assert max(rows) == 6 and min(rows) <= 3


def test_more_new_tokens_than_the_context_holds_is_said(tiny: Model, tmp_path: Path) -> None:
    (outcome,) = evaluated(tiny, "humaneval", data_dir=code_mirror(tmp_path), code=True)
    assert outcome.not_run == "context: 1024 tokens are generated, the model reads 1024; extend it with longft"


def test_gsm8k_direct_shows_numbers_alone_and_reads_the_first(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [{"question": f"How much is {i} and {i}?", "answer": f"Add them.\n#### {1000 * i + i:,}"} for i in range(1, 10)]
    write_items(tmp_path / "openai/gsm8k/main", "train", items)
    write_items(tmp_path / "openai/gsm8k/main", "test", [{"question": "And now?", "answer": "So.\n#### 1,234"}])
    for written, score in ((" $1,234 in all", 1.0), (" 1234", 1.0), (" 12, not 1234", 0.0), (" none", 0.0)):
        monkeypatch.setattr(tiny, "generate_until", lambda requests, disable_tqdm=False, text=written: [text for _ in requests])
        (outcome,) = evaluated(tiny, "gsm8k_direct", data_dir=tmp_path)
        assert (outcome.score, outcome.shots) == (score, 8), written
    prompt = outcome.samples["gsm8k_direct"][0]["arguments"][0][0]
    assert prompt.startswith("Question: How much is 1 and 1?\nAnswer: 1,001\n\nQuestion: How much is 2 and 2?")
    assert prompt.endswith("Question: And now?\nAnswer:") and "Add them" not in prompt


def test_arc_with_the_choices_in_the_prompt(tiny: Model, tmp_path: Path) -> None:
    folder = tmp_path / "allenai/ai2_arc/ARC-Challenge"
    items = arc_items(3)
    items[2]["choices"] = {"text": ["red", "green", "blue"], "label": ["1", "2", "3"]}
    items[2]["answerKey"] = "3"
    write_items(folder, "test", items)
    write_items(folder, "train", arc_items(30, "flower"))
    (outcome,) = evaluated(tiny, "arc_challenge_mcf", data_dir=tmp_path)
    sample = outcome.samples["arc_challenge_mcf"][2]
    assert sample["arguments"][0][0].endswith("Question: Which colour is stone 2?\nA. red\nB. green\nC. blue\nAnswer:")
    assert [continuation for _, continuation in sample["arguments"]] == [" A", " B", " C"]
    assert (sample["target"], sample["arguments"][0][0].count("flower"), outcome.shots) == (2, 25, 25)


def test_mmlu_pro_by_letters(tiny: Model, tmp_path: Path) -> None:
    subjects = (
        "biology,business,chemistry,computer science,economics,engineering,health,history,law,math,other,philosophy,physics,psychology"
    )
    folder = tmp_path / "TIGER-Lab/MMLU-Pro/default"

    def items(count: int) -> list[dict[str, Any]]:
        return [
            {
                "question": f"Q{i} of {subject}?",
                "options": [f"o{j}" for j in range(10 - i)],
                "answer": "B",
                "answer_index": 1,
                "category": subject,
            }
            for subject in subjects.split(",")
            for i in range(count)
        ]

    write_items(folder, "test", items(1))
    write_items(folder, "validation", items(5))
    (outcome,) = evaluated(tiny, "mmlu_pro_mc", data_dir=tmp_path)
    assert (outcome.n, outcome.shots, outcome.metric) == (14, 5, "acc,none")
    sample = outcome.samples["mmlu_pro_computer_science"][0]
    prompt = sample["arguments"][0][0]
    assert prompt.startswith(
        "The following are multiple choice questions (with answers) about computer science.\n\nQ0 of computer science?\nA. o0\n"
    )
    assert prompt.count("\nAnswer: B\n\n") == 5 and prompt.endswith("J. o9\nAnswer:")
    assert [continuation for _, continuation in sample["arguments"]] == [f" {letter}" for letter in "ABCDEFGHIJ"]


@pytest.mark.slow
def test_needles_are_drawn_alike_each_time_and_a_limit_takes_some_of_each_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import random

    folder = write_tiny_model(tmp_path / "model", context=8192)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"auto_map": {"AutoTokenizer": [None, "code.Own"]}}))
    (folder / "code.py").write_text("raise SystemExit('code of the folder was run')\n")
    model = loaded(folder)
    monkeypatch.setattr(model, "generate_until", lambda requests, disable_tqdm=False: ["" for _ in requests])
    before = random.getstate()
    first, again = (evaluated(model, "niah_single_1", limit=3) for _ in range(2))
    assert [(outcome.label, outcome.n, outcome.is_sample) for outcome in first] == [
        ("niah_single_1@4096", 3, True),
        ("niah_single_1@8192", 3, True),
    ]
    prompts, same = ([sample["arguments"][0][0] for sample in outcomes[0].samples["niah_single_1"]] for outcomes in (first, again))
    assert prompts == same and len(set(prompts)) == 6
    assert random.getstate() == before


def test_a_metric_that_a_task_does_not_have_is_named_before_it_is_run(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "loglikelihood", lambda *_, **__: pytest.fail("it was run"))
    (outcome,) = evaluated(tiny, "piqa metric=acc_nrom")
    assert outcome.not_run == "piqa metric=acc_nrom: has no metric acc_nrom; choose from acc, acc_norm"


def test_a_score_that_is_no_share_stands_as_it_is(tiny: Model, tmp_path: Path) -> None:
    texts = ["the king said that he would come to the king", "my lord my lord speak to my lord", "he is a man and so is a man"]
    write_items(tmp_path / "EleutherAI/lambada_openai/default", "test", [{"text": text} for text in texts])
    usual, perplexity = evaluated(tiny, "lambada_openai,lambada_openai metric=perplexity", data_dir=tmp_path)
    assert usual.is_share and usual.scale == 100
    assert not perplexity.is_share and perplexity.scale == 1
    assert perplexity.score is not None and perplexity.score == pytest.approx(usual.also["perplexity"]) and perplexity.score > 1
    assert perplexity.protocol == "0-shot, perplexity (not in percent)"
    cells = table([perplexity], Baselines.load()).splitlines()[2].split(" | ")
    assert cells[2].startswith(f"{perplexity.score:.1f} (perplexity")


def test_no_task_of_a_group_is_left_out_for_its_metric(tiny: Model, tmp_path: Path) -> None:
    folder = tmp_path / "truthfulqa/truthful_qa"
    answers = {"best_answer": "a", "correct_answers": ["a"], "incorrect_answers": ["b"], "type": "t", "category": "c", "source": "s"}
    write_items(folder / "generation", "validation", [{"question": "What?", **answers}])
    targets = {"choices": ["a", "b"], "labels": [1, 0]}
    write_items(folder / "multiple_choice", "validation", [{"question": "What?", "mc1_targets": targets, "mc2_targets": targets}])
    (outcome,) = evaluated(tiny, "truthfulqa", data_dir=tmp_path)
    names = "truthfulqa_gen, truthfulqa_mc1, truthfulqa_mc2"
    assert outcome.not_run == f"truthfulqa: its tasks have no metric in common; name them one by one: {names}"
    (outcome,) = evaluated(tiny, "truthfulqa metric=acc", data_dir=tmp_path)
    assert outcome.not_run == f"truthfulqa metric=acc: not all of its tasks have acc; name them one by one: {names}"


def test_documents_of_another_form_are_named(tiny: Model, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write_items(tmp_path / "Rowan/hellaswag/default", split, [{"x": 1}])
    (outcome,) = evaluated(tiny, "hellaswag", data_dir=tmp_path)
    assert outcome.not_run is not None
    assert outcome.not_run.startswith(f"hellaswag: the files in {tmp_path} are not what lm-eval's task reads (KeyError: 'ctx_a'); compare")


@pytest.fixture
def whole() -> Path:
    if not WHOLE.is_dir():
        pytest.skip(f"the complete benchmarks are not at {WHOLE}")
    return WHOLE


@pytest.mark.slow
def test_mmlu_and_redux_on_their_own_data(tiny: Model, whole: Path) -> None:
    mmlu, redux = evaluated(tiny, "mmlu,mmlu_redux", limit=2, data_dir=whole)
    assert (mmlu.n, redux.n, len(mmlu.samples), len(redux.samples)) == (114, 114, 57, 57)
    leaves = [mmlu.raw["results"][leaf]["acc,none"] for leaf in mmlu.samples]
    assert mmlu.score == pytest.approx(fmean(leaves))
    ours, theirs = (outcome.samples["mmlu_anatomy"][0]["arguments"][0][0] for outcome in (redux, mmlu))
    questions = ours.split("\n\n")
    assert questions[:6] == theirs.split("\n\n")[:6], "the description and five examples are those of cais/mmlu dev"
    assert (redux.shots, redux.metric, len(questions)) == (5, "acc,none", 7)


@pytest.mark.slow
def test_the_prompts_of_math_and_mbpp_on_their_own_data(tiny: Model, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "generate_until", lambda requests, disable_tqdm=False: ["" for _ in requests])
    zero, four, mbpp = evaluated(tiny, "hendrycks_math:0,hendrycks_math,mbpp", limit=1, data_dir=whole, code=True)
    (prompt, _), (bare, _) = (outcome.samples["hendrycks_math_algebra"][0]["arguments"][0] for outcome in (four, zero))
    assert prompt.endswith(bare) and prompt.count("Problem:") == 5 and bare.count("Problem:") == 1
    assert "\nAnswer: [2,5)\n\n" in prompt
    written = mbpp.samples["mbpp"][0]["arguments"][0][0]
    assert written.startswith("You are an expert Python programmer, and here is your task: Write a function to find the similar elements")
    assert written.count("[DONE]") == 3 and written.endswith("[BEGIN]\n")


@pytest.mark.slow
def test_any_task_of_lm_eval_runs_with_its_own_settings(tiny: Model, tmp_path: Path) -> None:
    item = {"support": "Grass is green.", "question": "What is grass?", "correct_answer": "green", "distractor3": "red"}
    for split in ("train", "validation", "test"):
        write_items(tmp_path / "allenai/sciq/default", split, [item | {"distractor1": "blue", "distractor2": "white"}] * 3)
    sciq, piqa = evaluated(tiny, "sciq,piqa", data_dir=tmp_path)
    assert (sciq.n, sciq.shots, sciq.metric, sciq.measure) == (3, 0, "acc_norm,none", "lm-eval's acc_norm")
    assert piqa.not_run
    assert not sciq.is_sample
    (part,) = evaluated(tiny, "sciq", data_dir=tmp_path, limit=2)
    assert part.is_sample and (part.n, part.request.row.documents) == (2, 3)
    with pytest.raises(UserError, match="did you mean piqa"):
        evaluated(tiny, "pika")
