from __future__ import annotations

from minifoundation.config import EvalOptions
from minifoundation.evaluate.baselines import Baselines
from minifoundation.evaluate.protocols import ROWS
from minifoundation.evaluate.requests import Request
from minifoundation.evaluate.results import Outcome
from minifoundation.evaluate.tables import again, report, table
from tests.evaluate.made import FACTS, outcome


def test_the_table_holds_score_error_chance_protocol_truncation_and_figures() -> None:
    outcomes = [
        outcome("hellaswag", truncated=3, requests=40_168),
        outcome("piqa", n=100),
        outcome("lambada_openai", also={"perplexity": 45.678}),
        Outcome(Request(ROWS["mbpp"], 3), "mbpp", not_run="needs --allow_code_exec"),
        Outcome(Request(ROWS["winogrande"], 5), "winogrande", not_run="data set allenai/winogrande: " + "no " * 30),
    ]
    text = table(outcomes, Baselines.load())
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("|")]
    names = ["Llama-3.2-1B", "Gemma-3-1B-PT", "Qwen2.5-0.5B", "Qwen2.5-1.5B"]
    assert rows[0] == ["benchmark", "protocol", "score", "± s.e.", "chance", "n", "truncated", *names]
    assert rows[2] == [
        "hellaswag",
        "10-shot, acc_norm",
        "43.2",
        "1.23",
        "25.0",
        "10042",
        "3 of 40168",
        "61.2 ≠",
        "62.3 ~",
        "52.1 ~",
        "67.9 ~",
    ]
    assert rows[3][5:] == ["100 of 1838", "0", "74.8 ≠", "73.8 ≠", "69.9 ≠", ""]
    assert rows[4][2] == "43.2 (perplexity 45.68)"
    assert rows[5][1] == "not run (needs --allow_code_exec)"
    assert rows[6][1].startswith("not run (data set allenai/winogrande: no no") and rows[6][1].endswith("...)")
    assert f"winogrande not run: {outcomes[-1].not_run}" in text and "mbpp not run" not in text, "a long reason stands whole below"
    assert len({len(line) for line in text.splitlines() if line.startswith("|")}) == 1, "the columns stand straight"


def test_the_report_says_what_was_read_and_how() -> None:
    text = report([outcome("piqa")], FACTS, Baselines.load())
    assert "| piqa" in text and "TinyLlama-1.1B-3T" in text and "compare these scores with nothing" not in text
    text = report([outcome("piqa")], FACTS | {"settings": {"limit": 5}, "sandbox": "a box"}, Baselines.load())
    assert "Only the first 5 documents" in text and "ran under: a box" in text


def test_the_line_that_measures_again_has_all_that_decides_the_scores() -> None:
    given = {"model_path": "runs/step_00000010", "tasks": "arc_easy,sciq metric=acc", "limit": 5, "dtype": "fp32", "ema": True}
    given |= {"data_dir": "my mirror", "allow_code_exec": True}
    line = again({"settings": EvalOptions.model_validate(given).model_dump(mode="json")})
    assert line == (
        "python -m src.cli eval --model_path runs/step_00000010 --tasks 'arc_easy,sciq metric=acc' --limit 5 --dtype fp32 "
        "--data_dir 'my mirror' --ema --allow_code_exec"
    )
    usual = EvalOptions(model_path="here", tasks="quick").model_dump(mode="json")
    assert again({"settings": usual}) == "python -m src.cli eval --model_path here --tasks quick --limit 0"
