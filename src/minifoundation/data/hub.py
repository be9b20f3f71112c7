"""Data sets of the Hugging Face Hub: short names, and the files of one at a fixed revision."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from minifoundation.data.remote import CONTACT_SECONDS, LISTING_SECONDS, TIMEOUT_SECONDS, hub_client, reason, retried
from minifoundation.errors import UserError


class HubCorpus(NamedTuple):
    """A data set of the Hugging Face Hub."""

    repository: str
    subset: str | None
    """The data set's own name of a part; None is its default."""
    instead: str
    """What to use when the Hub does not have it (any more)."""
    language: str | None = None
    """The ISO 639-1 code of what it is written in, where that is known."""


HUB = {
    "fineweb": HubCorpus("HuggingFaceFW/fineweb", "sample-10BT", "use fineweb-edu", "en"),
    "fineweb-edu": HubCorpus("HuggingFaceFW/fineweb-edu", "sample-10BT", "use fineweb", "en"),
    "slimpajama": HubCorpus(
        "cerebras/SlimPajama-627B",
        None,
        "use fineweb-edu, or download a copy such as DKYoon/SlimPajama-6B and give --data its folder",
        "en",
    ),
}
"""Corpora by short name; their languages are those of their cards.

``sample-10BT`` is drawn at random from all crawls and is a few files, so streaming begins at once and the first tokens are as
mixed as the Hub offers them. The default subset is thousands of files crawl after crawl: what a small run reads is 2013 alone.
"""


def hub_corpus(source: str) -> HubCorpus | None:
    """Return the data set of the Hub that ``source`` names, by a short name or as ``org/name`` or ``org/name:subset``; None for a path."""
    if source in HUB:
        return HUB[source]
    named = re.fullmatch(r"(\w[\w.-]*/[\w.-]+)(?::([\w.-]+))?", source)
    if named is None or Path(source).exists() or Path(source).parent.exists():  # a slip in the name of a file stays a path
        return None
    return HubCorpus(named[1], named[2], "check the name, org/name or org/name:subset, or give --data a path")


def language_of(repository: str) -> str | None:
    """Return the language of a data set that has a short name here; None of another one."""
    return next((corpus.language for corpus in HUB.values() if corpus.repository == repository), None)


def unreachable() -> str | None:
    """Return why the Hub does not answer, None when it does; asks once."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "the Hugging Face Hub is turned off by HF_HUB_OFFLINE"
    try:
        get_session().head(constants.ENDPOINT, timeout=CONTACT_SECONDS)
    except Exception as error:  # the HTTP library behind the session differs between versions
        return f"{constants.ENDPOINT} does not answer ({reason(error)})"
    return None


def hub_files(source: str, hub: HubCorpus, revision: str | None) -> tuple[str, list[str]]:
    """Return the commit and the URLs of the files of the split ``train``, as 🤗 datasets finds them.

    Args:
        revision: the commit to take; None is the newest.

    Raises:
        UserError: the data set, the commit or the subset is not there, must be asked for, or cannot be reached.
    """
    commit = repository_commit(source, hub.repository, "dataset", revision, hub.instead)
    try:
        data_files = retried(source, lambda: _resolved(source, hub, commit), patience=LISTING_SECONDS)
    except UserError:
        raise
    except Exception as error:
        raise UserError("data.source", f"the files of {source} cannot be listed ({reason(error)})", "run the same command again") from error
    if "train" not in data_files:
        splits = ", ".join(map(str, data_files)) or "none"
        raise UserError("data.source", f"{source} has no split train; its splits: {splits}", "give its files as hf://datasets/…")
    return commit, list(data_files["train"])


def repository_commit(source: str, repository: str, kind: str, revision: str | None, instead: str) -> str:
    """Return the commit hash of a revision of a repository of the Hub; None is its newest.

    Raises:
        UserError: it is not there, must be asked for, or cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    hub_client()
    place = f"{source} on the Hugging Face Hub" if source == repository else f"{source} ({repository} on the Hugging Face Hub)"
    api = huggingface_hub.HfApi()

    def found() -> str:
        info = api.repo_info(repository, repo_type=kind, revision=revision, timeout=TIMEOUT_SECONDS)
        if info.gated:
            api.auth_check(repository, repo_type=kind)
        return str(info.sha)

    try:
        return retried(place, found, patience=CONTACT_SECONDS)
    except GatedRepoError:
        raise _gated(repository) from None
    except RepositoryNotFoundError:
        raise UserError("data.source", f"{place} is not there", instead) from None
    except RevisionNotFoundError:
        raise UserError("data.source", f"{place} no longer has the revision {revision}", "start again in another data.shards_dir") from None
    except Exception as error:
        problem = f"{place} cannot be reached ({reason(error)})"
        raise UserError("data.source", problem, "connect to the network, or give --data a path") from error


def _gated(repository: str) -> UserError:
    remedy = f"accept its terms at https://huggingface.co/datasets/{repository}, then run hf auth login or set HF_TOKEN"
    return UserError("data.source", f"{repository} is gated: the Hugging Face Hub asks who you are", remedy)


def _resolved(source: str, hub: HubCorpus, commit: str) -> dict[Any, Any]:
    """Return the files of each split."""
    import datasets
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError

    datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(hub.repository, name=hub.subset, revision=commit)
    except DatasetNotFoundError as error:
        if "gated" in str(error):
            raise _gated(hub.repository) from None
        raise
    except (DataFilesNotFoundError, EmptyDatasetError):
        raise UserError("data.source", f"{source} holds no data files that can be read", hub.instead) from None
    except RuntimeError as error:
        if "scripts" not in str(error):
            raise
        remedy = "give its files as hf://datasets/…, or take a copy in Parquet"
        raise UserError("data.source", f"{source} is a program, which is not run", remedy) from None
    except ValueError as error:
        if "BuilderConfig" not in str(error) and "Config name" not in str(error):
            raise
        remedy = f"name a subset: {hub.repository}:subset"
        raise UserError("data.source", f"{source}: {' '.join(str(error).split())}", remedy) from None
    files = builder.config.data_files
    if not isinstance(files, dict):  # found in the cache on disk, which datasets falls back to without a word
        raise ConnectionError(f"the files of {hub.repository} could not be listed")
    return files
