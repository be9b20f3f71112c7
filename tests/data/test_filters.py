"""The filters against datatrove's own pipeline, and on texts that nobody wrote for them."""

import builtins
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minifoundation.config import QualityFilter
from minifoundation.data.filters import quality_filter
from minifoundation.data.rows import Bad
from minifoundation.errors import UserError

pytest.importorskip("datatrove", reason="pip install -e '.[filters]'")
pytest.importorskip("spacy", reason="pip install -e '.[filters]'")

NAMES: list[QualityFilter] = ["gopher-quality", "gopher-repetition", "c4", "fineweb"]
SHAKESPEARE = Path(__file__).parents[2] / "examples" / "shakespeare.txt"


def web_pages() -> list[str]:
    """Return 160 texts: prose in lines of several lengths, each with one of the faults that the rules are about, or none."""
    draw = random.Random(1)
    words = SHAKESPEARE.read_text().split()
    faults: list[Callable[[str], str]] = [
        lambda text: text,
        lambda text: text.replace("\n", " "),
        lambda text: text[:200],
        lambda text: text.replace("\n", "...\n"),
        lambda text: text.replace("\n", "\n- "),
        lambda text: text.replace(" ", " # "),
        lambda text: text.replace(" ", ""),
        lambda text: " ".join(text),
        lambda text: f"{text.replace(chr(10), ' ')}.\n" * 3,
        lambda text: text.replace(".", ".\n\n"),
        lambda text: text.replace(".", ""),
        lambda text: text + "\nLorem ipsum is what stands here.",
        lambda text: text + "\nint main() { return 0; }.",
        lambda text: text + "\nThis page uses cookies, and javascript.\nWe use cookies in all of our pages [1].",
        lambda text: text + " 17 2029 4711" * 100,
        lambda text: re.sub(r"\b(the|be|to|of|and|that|have|with)\b", "und", text),
    ]
    pages = []
    for number in range(160):
        start, width = draw.randrange(len(words) - 800), draw.choice([4, 12, 40])
        chosen = words[start : start + draw.randrange(60, 600)]
        lines = [" ".join(chosen[at : at + width]) for at in range(0, len(chosen), width)]
        pages.append(faults[number % len(faults)]("\n".join(lines)))
    return pages


def through_datatrove(name: QualityFilter, pages: list[str]) -> dict[int, str]:
    """Return what datatrove's own step leaves of the pages, by number."""
    from datatrove.data import Document
    from datatrove.pipeline import filters

    step: Any = {
        "gopher-quality": filters.GopherQualityFilter,
        "gopher-repetition": filters.GopherRepetitionFilter,
        "c4": filters.C4QualityFilter,
        "fineweb": filters.FineWebQualityFilter,
    }[name]()
    return {int(left.id): left.text for left in step(Document(text=text, id=str(number)) for number, text in enumerate(pages))}


@pytest.mark.parametrize("name", NAMES)
def test_a_filter_leaves_what_datatrove_leaves(name: QualityFilter) -> None:
    pages = web_pages()
    passed = quality_filter([name])
    ours = {number: kept for number, text in enumerate(pages) if not isinstance(kept := passed(text), Bad)}
    assert ours == through_datatrove(name, pages)
    assert 10 < len(ours) < 150, "the pages do not try the filter"


def test_filters_work_one_after_the_other() -> None:
    pages = web_pages()
    passed = quality_filter(["c4", "gopher-repetition"])
    left = through_datatrove("c4", pages)
    numbers = list(left)
    expected = {numbers[index]: text for index, text in through_datatrove("gopher-repetition", list(left.values())).items()}
    assert {number: kept for number, text in enumerate(pages) if not isinstance(kept := passed(text), Bad)} == expected


def test_reasons_name_the_filter_and_the_rule() -> None:
    passed = {name: quality_filter([name]) for name in NAMES}
    reasons = Counter(kept.reason for text in web_pages() for one in passed.values() if isinstance(kept := one(text), Bad))
    assert reasons.keys() >= {
        "gopher-quality: short_doc",
        "gopher-quality: above_avg_threshold",
        "gopher-quality: too_many_bullets",
        "gopher-quality: too_many_hashes",
        "gopher-quality: enough_stop_words",
        "gopher-repetition: dup_line_frac",
        "c4: lorem_ipsum",
        "c4: curly_bracket",
        "c4: too_few_sentences",
        "fineweb: line_punct_ratio",
        "fineweb: char_dup_ratio",
    }


def test_c4_takes_lines_out_of_a_document() -> None:
    prose = "\n".join(f"This is sentence number {number} of the text." for number in range(6))
    assert quality_filter(["c4"])(prose + "\nHome | About | Contact") == prose


@pytest.mark.parametrize(
    "text",
    [
        "... !!! ???",
        "\u200b",
        "\u200b\n.\n\n",
        "\x1c.",
        "IS_ALPHA",
        "a" * 100_000,
        "\n- \n- ",
        "😀" * 900,
        "中。" * 2000,
        "'\n" * 500,
        "(((a)))" * 50,
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_odd_texts_are_kept_or_counted(name: QualityFilter, text: str) -> None:
    kept = quality_filter([name])(text)
    assert kept.reason if isinstance(kept, Bad) else kept.strip()


@pytest.mark.timeout(60)
def test_a_megabyte_of_symbols_is_dropped_at_once() -> None:
    assert quality_filter(["fineweb"])("A rule:\n" + "=" * 1_000_000) == Bad("over 1,000 symbols in a row")


@pytest.mark.parametrize("missing", ["datatrove", "spacy"])
def test_what_is_not_installed_is_one_line(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return found(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=rf"data.filters: c4 needs {missing}, which is not installed; pip install -e '.\[filters\]'"):
        quality_filter(["c4"])
