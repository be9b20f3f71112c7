"""Quality filters for raw English text, as datatrove has them. Imported, like spaCy beneath them, only where they are asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from minifoundation.config import QualityFilter
from minifoundation.data.rows import Bad
from minifoundation.errors import UserError

if TYPE_CHECKING:
    from datatrove.pipeline.filters.base_filter import BaseFilter

LONG_RUN = re.compile(r"(?:[^\w\s]|_){1001,}")
"""More symbols in a row than any word may have letters in C4. spaCy takes them off one at a time and copies the rest each time: 0.2 s for
a thousand ``=``, 33 s for ten thousand, days for a megabyte."""


def quality_filter(names: Sequence[QualityFilter]) -> Callable[[str], str | Bad]:
    """Return a function that gives back a document as the filters leave it (C4 takes lines out), or why the first of them drops it.

    The rules and thresholds are datatrove's defaults, those of the papers: gopher-quality and gopher-repetition
    (Rae et al. 2021, arXiv:2112.11446, appendix A), c4 (Raffel et al. 2020, arXiv:1910.10683, section 2.2; without its list of
    bad words), fineweb (Penedo et al. 2024, arXiv:2406.17557, section 3.6). A reason is the filter's name and datatrove's word for
    the rule, as in ``gopher-quality: short_doc``.

    Raises:
        UserError: datatrove or spaCy is not installed.
    """
    require_datatrove("data.filters", ", ".join(names))
    from datatrove.data import Document

    filters = [(name, _filter(name)) for name in names]

    def passed(text: str) -> str | Bad:
        if LONG_RUN.search(text):
            return Bad("over 1,000 symbols in a row")
        document = Document(text=text, id="")
        for name, each in filters:
            match each.filter(document):
                case False, str(rule):
                    return Bad(f"{name}: {rule.removeprefix('gopher_')}")
        kept: str = document.text
        return kept

    return passed


def require_datatrove(setting: str, value: str) -> None:
    """Import datatrove and spaCy, and keep datatrove from logging.

    Raises:
        UserError: one of them is not installed; ``setting`` has ``value``, which needs it.
    """
    try:
        import spacy  # noqa: F401
        from datatrove.data import Document  # noqa: F401
        from loguru import logger
    except ModuleNotFoundError as error:
        raise UserError(setting, f"{value} needs {error.name}, which is not installed", "pip install -e '.[filters]'") from None
    logger.disable("datatrove")


def _filter(name: QualityFilter) -> BaseFilter:
    from datatrove.pipeline import filters

    match name:
        case "gopher-quality":
            return filters.GopherQualityFilter()
        case "gopher-repetition":
            return filters.GopherRepetitionFilter()
        case "c4":
            return filters.C4QualityFilter()
        case "fineweb":
            return filters.FineWebQualityFilter()
