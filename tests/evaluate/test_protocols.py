from __future__ import annotations

from minifoundation.evaluate.protocols import ROWS


def test_shots_are_those_of_the_mission() -> None:
    shots = {"mmlu": 5, "hellaswag": 10, "arc_easy": 0, "arc_challenge": 25, "winogrande": 5, "piqa": 0, "truthfulqa_mc2": 0}
    shots |= {"lambada_openai": 0, "gsm8k_direct": 8, "gsm8k": 5, "humaneval": 0, "mbpp": 3, "mmlu_redux": 5, "minerva_math": 4}
    assert {name: ROWS[name].shots for name in shots} == shots
    assert {name for name, row in ROWS.items() if row.runs_code} == {"humaneval", "mbpp"}
    assert {name for name, row in ROWS.items() if row.aggregate == "macro"} == {"mmlu", "mmlu_redux", "mmlu_continuation"}
