"""De-duplication against a plain dictionary, datatrove's own later steps, and the formula of locality-sensitive hashing."""

import json
import math
import random
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minifoundation.config import DataConfig
from minifoundation.data import dedup
from minifoundation.data.dedup import dropped, removals
from minifoundation.data.encode import kept_documents
from minifoundation.data.engines import Engine, Task, in_process, local
from minifoundation.data.pieces import Piece, pieces
from minifoundation.data.sources import find_corpus

WORDS = (Path(__file__).parents[2] / "examples" / "shakespeare.txt").read_text().split()


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minifoundation.data.pieces.PIECE_BYTES", 40_000)


def needs_datatrove() -> None:
    pytest.importorskip("datatrove", reason="pip install -e '.[filters]'")
    pytest.importorskip("spacy", reason="pip install -e '.[filters]'")


def passages(count: int, words: int, seed: int = 1) -> list[str]:
    """Return texts of random words, no two of which have a 5-gram in common but by chance."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=words)) for _ in range(count)]


def written(folder: Path, texts: Sequence[str]) -> DataConfig:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DataConfig(source=str(path))


def cut(config: DataConfig) -> list[list[str]]:
    """Return the documents of each piece."""
    return [list(kept_documents(piece, config, Counter())) for piece in pieces(find_corpus(str(config.source), config), config)]


def found(config: DataConfig, work: Path, engine: Engine | None = None) -> Path:
    return removals(find_corpus(str(config.source), config), config, engine or in_process(), work)


def numbers_dropped(config: DataConfig, path: Path) -> list[int]:
    """Return the documents that are dropped, counted in the whole corpus."""
    result, before = [], 0
    for number, texts in enumerate(cut(config)):
        result += [before + index for index in sorted(dropped(path, number))]
        before += len(texts)
    return result


def planted(seed: int = 2) -> list[str]:
    """Return 600 texts in pieces of some 15, of which every third is a copy of an earlier or later one; some have a word or none."""
    draw = random.Random(seed)
    texts = [*passages(380, 300), *(["word", "two words", "..."])]
    texts += draw.choices(texts, k=217)
    draw.shuffle(texts)
    return texts


@pytest.mark.parametrize("method", ["exact", pytest.param("minhash", marks=pytest.mark.slow)])
def test_all_but_the_first_of_equal_documents_are_dropped(method: str, tmp_path: Path) -> None:
    if method == "minhash":
        needs_datatrove()
    texts = planted()
    config = written(tmp_path, texts).model_copy(update={"dedup": method})
    assert len(cut(config)) > 20
    first: dict[str, int] = {}
    expected = [number for number, text in enumerate(texts) if first.setdefault(text, number) != number]
    assert len(expected) > 200
    assert numbers_dropped(config, found(config, tmp_path / "work")) == expected


def test_what_is_dropped_does_not_depend_on_pieces_or_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = written(tmp_path, planted()).model_copy(update={"dedup": "exact"})
    expected = found(config, tmp_path / "one range")
    monkeypatch.setattr(dedup, "KEYS_AT_ONCE", 17)
    assert found(config, tmp_path / "many ranges").read_bytes() == expected.read_bytes()
    numbers = numbers_dropped(config, expected)
    monkeypatch.setattr("minifoundation.data.pieces.PIECE_BYTES", 10**9)
    assert len(cut(config)) == 1
    assert numbers_dropped(config, found(config, tmp_path / "one piece")) == numbers


def test_documents_are_compared_and_counted_as_the_filters_leave_them(tmp_path: Path) -> None:
    needs_datatrove()
    prose = ["\n".join(f"This is line {line} of text number {number}." for line in range(9)) for number in range(40)]
    short = "Nothing much."
    texts = [part for number, text in enumerate(prose) for part in (text, short, f"{text}\nMenu {number} | About")]
    config = written(tmp_path, texts).model_copy(update={"dedup": "exact", "filters": ("c4",)})
    path = found(config, tmp_path / "work")
    left = [text for number, piece in enumerate(cut(config)) for index, text in enumerate(piece) if index not in dropped(path, number)]
    assert left == prose


def test_a_corpus_without_duplicates_or_documents_loses_nothing(tmp_path: Path) -> None:
    for texts in (passages(50, 30), []):
        config = written(tmp_path, texts).model_copy(update={"dedup": "exact"})
        path = found(config, tmp_path / "work")
        assert not dropped(path, 0) and not dropped(path, 99)


class Failing:
    """Does tasks in this process, and fails after some of them."""

    ahead = 3

    def __init__(self, tasks: int) -> None:
        self.left = tasks
        self.done = 0

    def submit(self, task: Task, pieces: Iterable[tuple[int, Piece]]) -> list[Future[None]]:
        futures: list[Future[None]] = []
        for number, piece in pieces:
            future: Future[None] = Future()
            futures.append(future)
            if self.left == 0:
                future.set_exception(OSError("killed"))
                continue
            task(number, piece)
            future.set_result(None)
            self.left -= 1
            self.done += 1
        return futures

    def close(self) -> None:
        pass


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedup, "KEYS_AT_ONCE", 100)
    config = written(tmp_path, planted()).model_copy(update={"dedup": "exact"})
    whole = Failing(-1)
    expected = found(config, tmp_path / "whole", whole).read_bytes()
    for tasks in (2, whole.done - 2):
        work = tmp_path / f"after {tasks}"
        with pytest.raises(OSError, match="killed"):
            found(config, work, Failing(tasks))
        rest = Failing(-1)
        path = found(config, work, rest)
        assert path.read_bytes() == expected
        assert rest.done == whole.done - tasks
        assert [left.name for left in path.parent.iterdir()] == ["removals.npy"]
        found(config, work, Failing(0))


def test_other_settings_are_looked_at_anew(tmp_path: Path) -> None:
    config = written(tmp_path, ["first\nsecond", "first", "second"] * 3).model_copy(update={"dedup": "exact"})
    path = found(config, tmp_path / "work")
    assert found(config.model_copy(update={"max_document_bytes": 6}), tmp_path / "work") != path
    (tmp_path / "corpus.jsonl").write_text('{"text": "other"}\n')
    assert found(config, tmp_path / "work") != path


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=40))
def test_of_each_cluster_the_first_place_stays(pairs: list[tuple[int, int]]) -> None:
    cluster = {place: {place} for pair in pairs for place in pair}
    for a, b in pairs:
        if cluster[a] is not cluster[b]:
            cluster[a] |= cluster[b]
            for place in cluster[b]:
                cluster[place] = cluster[a]
    links = [np.array([pair], np.uint64) for pair in pairs]
    assert dedup._followers(links).tolist() == sorted(place for place, members in cluster.items() if place != min(members))


def test_a_long_chain_is_one_cluster() -> None:
    order = np.random.default_rng(1).permutation(20_000).astype(np.uint64)
    links = np.stack([order[:-1], order[1:]], axis=1)
    assert dedup._followers([links]).tolist() == list(range(1, 20_000))


def edited(text: str, changes: int, draw: random.Random) -> str:
    words = text.split()
    for at in draw.sample(range(len(words)), changes):
        words[at] = draw.choice(WORDS)
    return " ".join(words)


def test_minhash_drops_what_datatroves_own_steps_put_together(tmp_path: Path) -> None:
    needs_datatrove()
    from datatrove.data import Document
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.hashing import HashConfig

    settings = MinhashConfig(hash_config=HashConfig(hash_fc="sha1"))
    draw = random.Random(3)
    texts = passages(120, 100)
    texts += [edited(text, draw.randrange(8), draw) for text in draw.choices(texts, k=130)]
    draw.shuffle(texts)
    config = written(tmp_path, texts).model_copy(update={"dedup": "minhash"})
    folders = [str(tmp_path / name) for name in ("signatures", "buckets", "clusters")]
    for number, piece in enumerate(cut(config)):
        MinhashDedupSignature(folders[0], settings).run((Document(text=text, id="") for text in piece), number)
    for bucket in range(14):
        MinhashDedupBuckets(folders[0], folders[1], config=settings).run(None, bucket, 14)
    MinhashDedupCluster(folders[1], folders[2], settings, save_cluster_id=True).run(None, 0, 1)
    clusters: dict[int, list[tuple[int, int]]] = {}
    for path in Path(folders[2]).glob("*.clusters"):
        for document, cluster in struct.iter_unpack("<2I", path.read_bytes()):
            clusters.setdefault(cluster, []).append((int(path.stem), document))
    expected = sorted(place for members in clusters.values() for place in sorted(members)[1:])
    assert len(expected) > 50

    path = found(config, tmp_path / "work")
    assert [(number, index) for number in range(len(cut(config))) for index in sorted(dropped(path, number))] == expected


def test_near_duplicates_are_found_as_often_as_the_formula_says(tmp_path: Path) -> None:
    """They are in 1 - (1 - s^8)^14 of the pairs whose 5-grams overlap by s (Leskovec et al., Mining of Massive Datasets, section 3.4)."""
    needs_datatrove()
    draw = random.Random(4)
    originals = passages(150, 120, seed=5)
    copies = [edited(text, 4 + number % 4, draw) for number, text in enumerate(originals)]
    config = written(tmp_path, [*originals, *copies]).model_copy(update={"dedup": "minhash"})
    predicted = []
    for text, copy in zip(originals, copies, strict=True):
        a, b = (set(dedup._minhash().get_shingles(one).ravel().tolist()) for one in (text, copy))
        predicted.append(1 - (1 - (len(a & b) / len(a | b)) ** 8) ** 14)
    expected = sum(predicted)
    assert 30 < expected < 120, "too easy or too hard to say anything"
    numbers = numbers_dropped(config, found(config, tmp_path / "work"))
    assert min(numbers) >= 150, "an original was dropped"
    deviation = math.sqrt(sum(chance * (1 - chance) for chance in predicted))
    assert abs(len(numbers) - expected) < 4 * deviation


def test_a_long_document_has_the_keys_of_its_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_datatrove()
    (text,) = passages(1, 500)
    keys = dedup._minhash_keys(text)
    monkeypatch.setattr(dedup, "SHINGLES_AT_ONCE", 7)
    assert dedup._minhash_keys(text) == keys


@pytest.mark.slow
@pytest.mark.parametrize("method", ["exact", "minhash"])
def test_two_processes_find_what_one_finds(method: str, tmp_path: Path) -> None:
    needs_datatrove()
    config = written(tmp_path, planted()).model_copy(update={"dedup": method})
    expected = found(config, tmp_path / "one").read_bytes()
    engine = local(2)
    try:
        assert found(config, tmp_path / "two", engine).read_bytes() == expected
    finally:
        engine.close()
