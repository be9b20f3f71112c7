"""The files of a corpus in a fixed order: a data set of the Hugging Face Hub, files below any URL, or files on disk."""

from __future__ import annotations

import glob
import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from minifoundation.config import DataConfig
from minifoundation.data.hub import HUB, hub_files, repository_commit
from minifoundation.data.hub import hub_corpus as hub_corpus
from minifoundation.data.remote import CONTACT_SECONDS, filesystem, is_missing, reason, retried
from minifoundation.errors import UserError

KINDS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = ("", ".gz", ".zst", ".xz")
FORMS = "a .txt, .jsonl or .parquet file (plain or .gz, .zst, .xz)"
REMEDY = "give a file or a folder of these"
VERSIONS = ("ETag", "etag", "Last-Modified", "LastModified", "mtime")
"""How servers call what changes with a file."""


@dataclass(frozen=True)
class File:
    """One file of a corpus."""

    url: str
    """What fsspec opens: a plain local path, hf://…@<revision>/…, s3://…, https://…"""
    name: str
    """Below the root of the corpus, with slashes; its bytes decide the order."""
    size: int | None
    """Bytes; None where the server has to be asked."""

    @property
    def remote(self) -> bool:
        """Whether it lies behind a network."""
        return "://" in self.url

    @property
    def form(self) -> tuple[str, str]:
        """The kind of file and its compression."""
        form = form_of(self.name)
        assert form is not None
        return form


@dataclass(frozen=True)
class Corpus:
    """The files of a source, and what tells them from others."""

    source: str
    files: tuple[File, ...]
    id: dict[str, Any]
    """Plain JSON values, recorded in the manifest."""


def find_corpus(source: str, config: DataConfig, *, known: dict[str, Any] | None = None) -> Corpus:
    """Return the corpus that ``source`` names.

    Files are told apart by their names below the root, their sizes and both their ends (behind a network: what the server says of
    them); where the root lies does not matter. A corpus of the Hub is told apart by its revision.

    Args:
        known: the ``id`` of an earlier call; a corpus of the Hub is then taken at the same revision, so that no two are mixed.

    Raises:
        UserError: there is none of that name, it holds no file of text, or it cannot be reached.
    """
    known = known or {}
    column = {"column": config.text_column}
    if (hub := hub_corpus(source)) is not None:
        of_hub = {"hub": hub.repository, "subset": hub.subset}
        commit, urls = hub_files(source, hub, known.get("revision") if of_hub.items() <= known.items() else None)
        found = [File(url, url.partition(f"@{commit}/")[2] or url, None) for url in urls]
        return Corpus(source, _texts(source, found), {**of_hub, "revision": commit, **column})
    if source.startswith("hf://"):
        url, commit = _pinned(source, known.get("revision") if known.get("hub") == source else None)
        return Corpus(source, _texts(source, _listed(source, url)), {"hub": source, "revision": commit, **column})
    if "://" in source and not source.startswith("file://"):
        marks = _listed(source, source)
        files = _texts(source, marks)
        return Corpus(source, files, {**_counted(files, marks), **column})
    files = _local_files(source.removeprefix("file://"))
    return Corpus(source, files, {**_counted(files, {file: _ends(file) for file in files}), **column})


def form_of(name: str) -> tuple[str, str] | None:
    """Return the kind of file and its compression by name, None for a file that is no text."""
    name = name.lower()
    if name.endswith(tuple(".json" + packed for packed in COMPRESSIONS if packed)):
        name = name.replace(".json.", ".jsonl.")  # lines too, in C4 and Dolma; a plain .json is mostly notes beside a corpus
    return next(((kind, packed) for kind in KINDS for packed in COMPRESSIONS if name.endswith(kind + packed)), None)


def _texts(source: str, files: Iterable[File]) -> tuple[File, ...]:
    """Return the files of text in the order of their names, without hidden ones.

    Raises:
        UserError: there is none.
    """
    files = list(files)
    shown = [file for file in files if form_of(file.name) and not any(part.startswith(".") for part in PurePosixPath(file.name).parts)]
    if not shown:
        others = sorted({_ending(PurePosixPath(file.name)) for file in files} - {""})
        found = f", only {', '.join(others[:5])}" if others else ""
        raise UserError("data.source", f"{source} holds no {FORMS.removeprefix('a ')}{found}", REMEDY)
    return tuple(sorted(shown, key=lambda file: os.fsencode(file.name)))


def _ending(name: PurePosixPath) -> str:
    packed = name.suffix if name.suffix in COMPRESSIONS else ""
    return name.with_suffix("").suffix + packed if packed else name.suffix


def _counted(files: tuple[File, ...], marks: dict[File, bytes]) -> dict[str, Any]:
    digest = hashlib.sha256()
    sizes = [file.size for file in files]
    for file in files:
        digest.update(os.fsencode(file.name) + f"\0{file.size}\0".encode() + marks[file])
    return {"files": len(files), "bytes": None if None in sizes else sum(filter(None, sizes)), "sha256": digest.hexdigest()}


def path_of(source: str) -> Path:
    """Return the path of a corpus of this machine, given as a path or a file:// address.

    Raises:
        UserError: it begins with ``~`` and the name of nobody here.
    """
    try:
        return Path(source.removeprefix("file://")).expanduser()
    except RuntimeError:
        raise UserError("data.source", f"{source}: there is no such user", "write the whole path") from None


def place_of(source: str) -> Any:
    """Return what two spellings of one source have in common: the Hub's data set and its subset, an address, or the resolved path."""
    hub = hub_corpus(source)
    return hub[:2] if hub else source if is_remote(source) else path_of(source).resolve()


def is_remote(source: str) -> bool:
    """Return whether the text of ``source`` lies behind a network."""
    return hub_corpus(source) is not None or ("://" in source and not source.startswith("file://"))


def is_gone(source: str) -> bool:
    """Return whether no file is (any more) where a corpus of this machine lay."""
    root = path_of(source)
    if root.is_dir():
        return next(_below(root), None) is None
    return not root.exists() and not (glob.has_magic(source) and any(_matches(source)))


def _local_files(source: str) -> tuple[File, ...]:
    root = path_of(source)
    if root.is_file():
        if form_of(root.name) is None:
            raise UserError("data.source", f"{source} is not {FORMS}", REMEDY)
        return (File(str(root.absolute()), root.name, root.stat().st_size),)
    if root.is_dir():
        found = list(_below(root))
    elif glob.has_magic(source):
        found, root = list(_matches(source)), _above_magic(root)
    else:
        raise _unknown(source, root)
    if lost := [path for path in found if form_of(path.name) and not path.exists()]:
        raise UserError(str(min(lost)), "is a link to what is not there", "mend that, or take it out of the corpus")
    # A worker of another machine may stand in another folder.
    return _texts(
        source, (File(str(path.absolute()), path.relative_to(root).as_posix(), path.stat().st_size) for path in found if path.is_file())
    )


def _below(root: Path) -> Iterator[Path]:
    """Yield each file and each link to nothing below ``root`` that is not hidden; folders behind links too, every folder once."""
    seen = set()
    linked = [root]
    while linked:
        folders = [linked.pop(0)]
        while folders:
            folder = folders.pop()
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            for entry in sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name)):
                path = Path(entry.path)
                if entry.name.startswith("."):
                    continue
                if not path.is_dir():
                    yield path
                else:  # where it is itself before where links lead to it
                    (linked if entry.is_symlink() else folders).append(path)


def _matches(source: str) -> Iterator[Path]:
    """Yield each file and each link that a pattern names.

    Raises:
        UserError: it is a pattern that versions of Python read differently.
    """
    pattern = path_of(source)
    if any("**" in part and part != "**" for part in pattern.parts):
        raise UserError("data.source", f"{source}: ** beside other letters", "write ** as a whole part of the path, as in data/**/*.txt")
    root = _above_magic(pattern)
    below = pattern.relative_to(root)
    seen = set()
    for path in root.glob(str(below / "*" if below.name == "**" else below)):
        if path not in seen and (path.is_file() or path.is_symlink()):  # where ** stands twice, Python 3.13 gives a file more than once
            seen.add(path)
            yield path


def _above_magic(pattern: Path) -> Path:
    """Return the folder above the first part of the pattern that is one."""
    plain = pattern
    while glob.has_magic(str(plain)):
        plain = plain.parent
    return plain


def _ends(file: File) -> bytes:
    """Return the first and the last bytes of a local file.

    Raises:
        UserError: it cannot be read.
    """
    assert file.size is not None
    try:
        with Path(file.url).open("rb") as stream:
            first = stream.read(4096)
            stream.seek(max(0, file.size - 4096), io.SEEK_SET)
            return first + stream.read(4096)
    except OSError as error:
        raise UserError(file.url, f"cannot be read ({error.strerror})", "fix that, or remove it from the corpus") from None


def _listed(source: str, url: str) -> dict[File, bytes]:
    """Return the files that a URL means (a file, a folder or a pattern), each with the mark by which its server tells versions apart.

    Raises:
        UserError: there is nothing, or it cannot be read.
    """
    fs, path = filesystem(url)
    web = url.startswith(("http://", "https://"))
    magic = re.search(r"\*" if web else r"[*\[]", path)
    single = not magic and form_of(_without_query(path)) is not None
    root = path[: magic.start()].rpartition("/")[0] if magic else path.rpartition("/")[0] if single else path.rstrip("/")

    def infos() -> dict[str, dict[str, Any]]:
        infos = fs.glob(path, detail=True) if magic else {path: fs.info(path)} if single else fs.find(path, detail=True)
        return {name: info for name, info in infos.items() if info["type"] == "file"}

    try:
        found = retried(source, infos, patience=CONTACT_SECONDS)
        if web:  # a page of links tells neither sizes nor versions
            for name in [name for name in found if form_of(_without_query(name))]:
                found[name] = retried(name, partial(fs.info, name), patience=CONTACT_SECONDS)
    except Exception as error:
        raise _unreachable(source, error) from error
    files = {}
    for name, info in found.items():
        # A web server may not be able to begin in the middle, whatever size it tells: it is asked when the file is read.
        file = File(fs.unstrip_protocol(name), _without_query(name).removeprefix(root + "/"), None if web else info["size"])
        version = next((info[field] for field in VERSIONS if info.get(field)), "")
        files[file] = f"{info['size']} {version}".encode()
    return files


def _without_query(address: str) -> str:
    return re.split(r"[?#]", address)[0]


def _pinned(source: str, revision: str | None) -> tuple[str, str]:
    """Return the hf:// URL at a fixed commit, and that commit."""
    fs, path = filesystem(source)
    try:
        resolved = retried(source, lambda: fs.resolve_path(path), patience=CONTACT_SECONDS)
    except Exception as error:
        raise _unreachable(source, error) from error
    if not hasattr(resolved, "repo_id"):
        raise UserError("data.source", f"{source} is not a data set of the Hub", "write hf://datasets/org/name/path")
    commit = repository_commit(source, resolved.repo_id, resolved.repo_type, revision or resolved.revision, "check the address")
    kind = "" if resolved.repo_type == "model" else f"{resolved.repo_type}s/"
    return f"hf://{kind}{resolved.repo_id}@{commit}/{resolved.path_in_repo}".rstrip("/"), commit


def _unreachable(source: str, error: Exception) -> UserError:
    if is_missing(error):
        return UserError("data.source", f"{source} is not there", "check the address")
    return UserError("data.source", f"{source} cannot be read ({reason(error)})", "check the address, your network and credentials")


def _unknown(source: str, root: Path) -> UserError:
    if root.exists() or root.is_symlink():
        return UserError("data.source", f"{source} is neither a file nor a folder, nor a link to one", f"give {FORMS}, or a folder of them")
    near = get_close_matches(source, HUB, n=1)
    if not near and root.parent.is_dir():
        near = [str(root.with_name(name)) for name in get_close_matches(root.name, [path.name for path in root.parent.iterdir()], n=1)]
    remedy = f"did you mean {near[0]}?" if near else f"give one of {', '.join(HUB)}, org/name of the Hub, or a path"
    return UserError("data.source", f"{source!r} is neither a known corpus nor a path", remedy)
