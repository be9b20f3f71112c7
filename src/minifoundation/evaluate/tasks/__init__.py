"""Functions that our own task files name."""

from __future__ import annotations

from typing import Any

from minifoundation.evaluate.sandbox import sandbox

LETTERS = "ABCDEFGHIJ"


def lettered_options(options: list[str]) -> str:
    """Return the options of a question as lines that begin with their letters."""
    return "\n".join(f"{letter}. {option.strip()}" for letter, option in zip(LETTERS, options, strict=False))


def mmlu_pro_question(doc: dict[str, Any]) -> str:
    """Return an MMLU-Pro question in the layout of MMLU."""
    return f"{doc['question'].strip()}\n{lettered_options(doc['options'])}\nAnswer:"


def mmlu_pro_letters(doc: dict[str, Any]) -> list[str]:
    """Return as many letters as an MMLU-Pro question has options."""
    return list(LETTERS[: len(doc["options"])])


def arc_question(doc: dict[str, Any]) -> str:
    """Return an ARC question with its choices lettered (some questions of ARC number them)."""
    return f"Question: {doc['question'].strip()}\n{lettered_options(doc['choices']['text'])}\nAnswer:"


def arc_letters(doc: dict[str, Any]) -> list[str]:
    """Return as many letters as an ARC question has choices."""
    return list(LETTERS[: len(doc["choices"]["text"])])


def mbpp_examples(dataset: Any) -> Any:
    """Return the three examples of the MBPP paper (arXiv:2108.07732, section 3): tasks 2, 3 and 4."""
    return dataset.filter(lambda doc: doc["task_id"] in (2, 3, 4))


def humaneval_result(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return whether the completed function passes the tests of its problem (arXiv:2107.03374)."""
    program = f"{doc['prompt']}{results[0]}\n{doc['test']}\ncheck({doc['entry_point']})\n"
    return {"pass@1": float(sandbox().passes(program))}


def mbpp_result(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return whether the written function passes the three assertions of its problem."""
    program = "\n".join([results[0], doc["test_setup_code"], *doc["test_list"]])
    return {"pass@1": float(sandbox().passes(program))}
