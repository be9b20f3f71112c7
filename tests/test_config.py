"""Settings: bounds, precedence, messages, and the YAML files that are shipped."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from minifoundation import config
from minifoundation.config import (
    DataConfig,
    EvalOptions,
    ModelConfig,
    PretrainOptions,
    RopeConfig,
    RunConfig,
    TokenizerConfig,
    TrainConfig,
)
from minifoundation.errors import UserError

CONFIGS = config.REPOSITORY / "configs"
SMALL: dict[str, Any] = {
    "model": {"d_model": 64, "n_layer": 1, "n_head": 4, "n_kv_head": 2, "d_ff": 128, "original_seq_len": 128},
    "data": {"source": "text"},
    "train": {"tokens": 1024, "seq_len": 128},
}


def small(**sections: dict[str, Any]) -> dict[str, Any]:
    return config.merged(SMALL, sections)


def refusal(values: dict[str, Any], kind: type[config.Settings] = RunConfig) -> UserError:
    with pytest.raises(UserError) as caught:
        config.build(kind, values, "a.yaml")
    assert "\n" not in str(caught.value)
    return caught.value


def test_settings_come_back_from_json() -> None:
    run = config.build(RunConfig, small(tokenizer={"path": "spm.model"}), "line")
    assert RunConfig.model_validate_json(run.model_dump_json()) == run


@pytest.mark.parametrize("name", ["model_0p5b", "model_1b", "demo"])
def test_the_shipped_yaml_files_are_runs(name: str) -> None:
    values = config.merged(config.read_yaml(CONFIGS / f"{name}.yaml"), {"data": {"source": "fineweb"}})
    run = config.build(RunConfig, values, name)
    assert run.train.seq_len == run.model.original_seq_len
    assert run.tokenizer.vocab_size == run.model.vocab_size
    assert run.model.vocab_size % 128 == 0
    assert run.model.d_ff == -(-run.model.d_model * 8 // 3 // 128) * 128, "8/3 d_model, rounded up to a multiple of 128"


def test_longft_yaml_lies_over_a_pretraining_run() -> None:
    below = config.merged(config.read_yaml(CONFIGS / "model_0p5b.yaml"), {"data": {"source": "fineweb"}})
    values = config.merged(config.merged(below, config.read_yaml(CONFIGS / "longft.yaml")), {"model": {"rope": {"factor": 4}}})
    run = config.build(RunConfig, values, "longft.yaml")
    assert run.model.rope.scaling == "yarn"
    assert run.train.seq_len == run.model.max_seq_len == 16_384
    assert run.train.lr == pytest.approx(below["train"]["lr"] * TrainConfig(tokens=1).min_lr)
    assert run.train.tokens == 400 * 16 * run.train.seq_len


@pytest.mark.parametrize("name", ["model_0p5b", "model_1b", "longft", "demo"])
def test_every_number_in_the_shipped_yaml_files_says_where_it_comes_from(name: str) -> None:
    lines = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if re.match(r"\s*\w+: [0-9]", line) and "#" not in line] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("200_000_000", 200_000_000),
        ("2e8", 200_000_000),
        ("1.5E+3", 1500),
        ("7", 7),
    ],
)
def test_whole_numbers_as_typed(text: str, expected: int) -> None:
    assert config.build(RunConfig, small(train={"tokens": text}), "line").train.tokens == expected


def test_yaml_numbers_in_every_spelling(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("train: {lr: 3e-4, tokens: 200_000_000, grad_clip: null, compile: yes, batch_size: auto, eps: 1.0e-8}\n")
    train = config.build(RunConfig, config.merged(SMALL, config.read_yaml(path)), "a.yaml").train
    assert (train.lr, train.tokens, train.grad_clip, train.compile, train.batch_size) == (3e-4, 200_000_000, None, True, "auto")


def test_a_tilde_is_the_home_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert config.build(RunConfig, small() | {"out_dir": "~/runs"}, "line").out_dir == Path("/home/someone/runs")
    with_tokenizer = config.build(RunConfig, small(tokenizer={"path": "~/spm.model"}), "line")
    assert with_tokenizer.tokenizer.path == Path("/home/someone/spm.model")
    report = config.build(config.ReportOptions, {"runs": "~/a, ~/b,c", "out_dir": "~/report"}, "line")
    assert report.runs == (Path("/home/someone/a"), Path("/home/someone/b"), Path("c")) and report.out_dir == Path("/home/someone/report")
    evaluated = config.build(config.EvalOptions, {"model_path": "~/hf", "tasks": "~/tasks.txt"}, "line")
    assert (evaluated.model_path, evaluated.tasks) == ("/home/someone/hf", "/home/someone/tasks.txt")
    for resume in ("~/runs/step_00000010", "auto", None):
        found = config.build(config.PretrainOptions, {"resume": resume}, "line").resume
        assert found == (resume and resume.replace("~", "/home/someone"))
    fault = refusal({"runs": "a,~nobody-of-that-name/x"}, config.ReportOptions)
    assert str(fault) == "runs: ~nobody-of-that-name/x: there is no such user; write the whole path"
    fault = refusal({"model_path": "~nobody-of-that-name/x"}, config.EvalOptions)
    assert str(fault) == "model_path: ~nobody-of-that-name/x: there is no such user; write the whole path"


def test_none_is_off_only_where_a_setting_can_be_off() -> None:
    assert config.build(RunConfig, small(train={"grad_clip": "none"}), "line").train.grad_clip is None
    assert config.build(RunConfig, small(model={"rope": {"scaling": "none"}}), "line").model.rope.scaling == "none"
    assert refusal(small(train={"seq_len": "none"})).where == "train.seq_len"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"lrr": 1}}, "train.lrr: unknown setting (in a.yaml); did you mean train.lr?"),
        ({"lr": 1}, "lr: unknown setting (in a.yaml); did you mean train.lr?"),
        ({"model": {"seq_len": 1}}, "model.seq_len: unknown setting (in a.yaml); did you mean train.seq_len?"),
        ({"model": {"rope": {"scalling": "yarn"}}}, "model.rope.scalling: unknown setting (in a.yaml); did you mean model.rope.scaling?"),
        ({"qqqq": 1}, "qqqq: unknown setting (in a.yaml); --help lists the settings"),
        (
            {"model": {"n_head": 5}},
            "model: d_model 64 is not divisible by n_head 5; choose n_head among its divisors, or set head_dim",
        ),
        (
            {"model": {"n_kv_head": 3}},
            "model: n_head 4 is not divisible by n_kv_head 3; choose n_kv_head among its divisors",
        ),
        ({"model": {"n_head": 64, "n_kv_head": 1}}, "model: head width d_model/n_head = 1 is odd; RoPE needs an even width"),
        ({"model": {"head_dim": 15}}, "model: head width head_dim = 15 is odd; RoPE needs an even width"),
        ({"model": {"head_dim": 0}}, "model.head_dim: 0 is not valid; input should be greater than or equal to 2"),
        (
            {"train": {"precision": "fp8"}, "model": {"head_dim": 18}},
            "a.yaml: model.n_head x head width 72 is not a multiple of 16, which train.precision fp8 needs; choose one, or take bf16",
        ),
        (
            {"train": {"seq_len": 256}},
            "a.yaml: train.seq_len 256 is longer than the model's 128 (model.original_seq_len x model.rope.factor); "
            "shorten it, or extend the model with longft",
        ),
        (
            {"train": {"schedule": "wsd", "warmup": 0.5, "decay": 0.6}},
            "train: warmup 0.5 and decay 0.6 are more than all steps together; lower one of them",
        ),
        ({"data": {"min_tokens": 1}}, "data.min_tokens: must be at least 2, auto or none; correct it"),
        ({"model": {"rope": {"scaling": "yarn", "beta_fast": 1}}}, "model.rope: beta_fast 1 must be larger than beta_slow 1; correct it"),
        (
            {"model": {"rope": {"scaling": "llama3", "high_freq_factor": 1}}},
            "model.rope: high_freq_factor 1 must be larger than low_freq_factor 1; correct it",
        ),
        (
            {"model": {"rope": {"scaling": "yarn", "max_seq_len": 512}}},
            "model.rope: max_seq_len 512 is a setting of scaling llama3, and scaling is yarn; leave it out",
        ),
        (
            {"model": {"rope": {"scaling": "llama3", "max_seq_len": 96}}},
            "model: rope.max_seq_len 96 is shorter than original_seq_len 128; leave it out, or correct one of them",
        ),
        (
            {"model": {"rope": {"scaling": "llama3", "factor": 32, "max_seq_len": 192}}, "train": {"seq_len": 256}},
            "a.yaml: train.seq_len 256 is longer than the model's 192 (model.rope.max_seq_len); "
            "shorten it, or extend the model with longft",
        ),
        ({"train": {"tokens": "many"}}, "train.tokens: 'many' is not valid; input should be a valid integer"),
        ({"train": {"tokens": 0}}, "train.tokens: 0 is not valid; input should be greater than or equal to 1"),
        ({"train": {"lr": float("nan")}}, "train.lr: nan is not valid; input should be a finite number"),
        ({"train": {"schedule": "cosin"}}, "train.schedule: 'cosin' is not valid; input should be 'cosine', 'constant' or 'wsd'"),
        ({"train": {"batch_size": "many"}}, "train.batch_size: 'many' is not valid; input should be a valid integer"),
        ({"train": {"batch_size": 0}}, "train.batch_size: must be at least 1, or auto; correct it"),
        (
            {"train": {"precision": "fp8"}, "model": {"d_ff": 72}},
            "a.yaml: model.d_ff 72 is not a multiple of 16, which train.precision fp8 needs; choose one, or take bf16",
        ),
        (
            {"train": {"precision": "fp8"}, "model": {"dropout": 0.1}},
            "a.yaml: model.dropout 0.1 does not work with train.precision fp8; set it to 0, or take bf16",
        ),
        (
            {"train": {"context_parallel": 3, "seq_len": 128}},
            "a.yaml: train.seq_len 128 is not a multiple of 6, as train.context_parallel 3 needs (two chunks of a row for each process); "
            "set it to 126",
        ),
        (
            {"train": {"context_parallel": 2, "precision": "fp8", "seq_len": 16}},
            "a.yaml: train.seq_len 16 is not a multiple of 32, as train.context_parallel 2 needs",
        ),
        (
            {"train": {"context_parallel": 2}, "model": {"attention": "cudnn"}},
            "a.yaml: model.attention cudnn cannot read a row in chunks, as train.context_parallel 2 does; take auto, flash4 or flash",
        ),
        ({"model": 3}, "model: 3 is not a section of settings; write 'model:', and below it 'name: value', indented"),
        (
            {"train": {"grad_clip": False}},
            "train.grad_clip: False is not a number (YAML reads yes, no, on and off as true and false); "
            "give a number, or none to turn it off",
        ),
        (
            {"train": {"save_every": True}},
            "train.save_every: True is not a number (YAML reads yes, no, on and off as true and false); give a number",
        ),
        ({"model": {"rope": {"factor": 1e308}}}, "model.rope.factor: 1e+308 is not valid; input should be less than or equal to 1000000"),
        ({"train": {"seed": 2**64}}, f"train.seed: {2**64} is not valid; input should be less than {2**63}"),
        ({"train": {"tokens": 10**23}}, "train.tokens: 100000000000000000000000 is not valid; input should be less than or equal to"),
        ({"model": {"n_layer": 10**30}}, f"model.n_layer: {10**30} is not valid; input should be less than or equal to 10000"),
        ({"train.lr": 1}, "train.lr: stands by its dotted name (in a.yaml); write 'train:', and 'lr: value' below it, indented"),
        ({"out_dir": "~nobody-of-that-name/x"}, "out_dir: ~nobody-of-that-name/x: there is no such user; write the whole path"),
        ({"out_dir": ""}, "out_dir: is empty; give a path, or leave it out"),
        ({"out_dir": 5}, "out_dir: 5 is not a path; write a path, in quotation marks where YAML reads something else"),
        ({"train": None}, "train: has nothing below it; write 'name: value' below it, indented, or leave it out"),
        ({"data": {"source": " "}}, "data.source: is empty; give a corpus, a path or an address"),
        ({"train": {"learning_rate": 1}}, "train.learning_rate: unknown setting (in a.yaml); did you mean train.lr?"),
    ],
)
def test_a_fault_is_one_line_with_name_value_and_remedy(sections: dict[str, Any], message: str) -> None:
    assert str(refusal(config.merged(SMALL, sections))).startswith(message)


def test_both_spellings_of_a_batch_size_are_in_the_remedy() -> None:
    assert refusal(small(train={"batch_size": "many"})).remedy.endswith("or input should be 'auto'")


def test_a_missing_setting_names_its_flag() -> None:
    without = {name: section for name, section in SMALL.items() if name != "data"}
    expected = "data.source: required and not set (in a.yaml); set it in the YAML or with --data or --data.source"
    assert str(refusal(without)) == expected
    neither = "data: neither data.source nor data.mix is set; give --data, or a mixture in the YAML"
    assert str(refusal(small() | {"data": {}})) == neither
    assert refusal({}, EvalOptions).remedy == "set it in the YAML or with --model_path"


@pytest.mark.parametrize("given", ["a/b:c=3,code=1", {"a/b:c": 3, "code": "1"}])
def test_a_mixture_in_words_or_yaml(given: Any) -> None:
    data = config.build(DataConfig, {"mix": given}, "a.yaml")
    assert data.weights == {"a/b:c": 0.75, "code": 0.25}


def test_one_source_has_all_the_weight() -> None:
    assert DataConfig(source="code").weights == {"code": 1.0}


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"source": "a", "mix": {"b": 1}}, "data: data.source is a, and data.mix is set too"),
        ({"mix": {}}, "data: data.mix is empty"),
        ({"mix": {"a": 1, "b": 0}}, "data: the weight of b in data.mix is 0; give a number above 0"),
        ({"mix": "a"}, "data.mix: 'a' is not a mixture; write source=weight,source=weight"),
        ({"mix": {"a": "much"}}, "data.mix.a: 'much' is not valid"),
        ({"mix": "a=1,b=2,a=3"}, "data.mix: 'a=1,b=2,a=3' names a source twice; give each its weight once"),
        ({"source": "a", "filters": "gopher"}, "data.filters: 'gopher' is not valid"),
    ],
)
def test_a_faulty_mixture_is_one_line(data: dict[str, Any], problem: str) -> None:
    assert str(refusal(small() | {"data": data})).startswith(problem)


def test_the_nearer_of_a_source_and_a_mixture_counts() -> None:
    below, above = {"data": {"mix": {"a": 1}}}, {"data": {"source": "b"}}
    assert config.merged(below, above)["data"] == {"source": "b"}
    assert config.merged(above, below)["data"] == {"mix": {"a": 1}}
    assert config.merged(below, {"data": {"held_out": 0.1}})["data"] == {"mix": {"a": 1}, "held_out": 0.1}
    assert config.merged(below, {"data": {"mix": {"b": 1}}})["data"] == {"mix": {"b": 1}}, "not a mixture of both"


def test_the_nearer_of_micro_batches_and_tokens_of_a_step_counts() -> None:
    below, above = {"train": {"grad_accum": 8}}, {"train": {"tokens_per_step": 4096}}
    assert config.merged(below, above)["train"] == {"tokens_per_step": 4096}
    assert config.merged(above, below)["train"] == {"grad_accum": 8}
    assert config.merged(below, {"train": {"tokens_per_step": "none"}})["train"] == {"grad_accum": 8, "tokens_per_step": "none"}


def test_filters_in_words() -> None:
    assert DataConfig(source="a", filters="c4,fineweb").filters == ("c4", "fineweb")  # type: ignore[arg-type]


def test_settings_are_frozen() -> None:
    run = config.build(RunConfig, SMALL, "line")
    with pytest.raises(ValueError, match="frozen"):
        run.train.lr = 1.0


@pytest.mark.parametrize("kind", [RopeConfig, TokenizerConfig, EvalOptions, PretrainOptions, RunConfig])
def test_every_setting_is_explained(kind: type[config.Settings]) -> None:
    assert [name for name, field in config.fields(kind) if not field.description] == []


def test_no_two_settings_share_a_flag() -> None:
    for kinds in ((PretrainOptions, RunConfig), (config.LongftOptions, RunConfig), (config.PrepareOptions, config.PrepareConfig)):
        flags = [flag for kind in kinds for flag in config.flags(kind).values()]
        assert len(flags) == len(set(flags))


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("lr", ["train.lr", "model.d_ff"], "train.lr"),
        ("model.lr", ["train.lr", "model.d_ff"], "train.lr"),
        ("train.warmpu", ["train.warmup", "train.lr"], "train.warmup"),
        ("warmpu", ["train.warmup", "train.lr"], "train.warmup"),
        ("zzz", ["train.warmup"], None),
        ("steps", ["train.tokens", "train.eps"], "train.tokens"),
        ("learning_rate", ["train.min_lr", "train.lr"], "train.lr"),
        ("checkpoint", ["ckpt"], "ckpt"),
        ("steps", ["steps"], "steps"),
    ],
)
def test_nearest(name: str, known: list[str], expected: str | None) -> None:
    assert config.nearest(name, known) == expected


def test_merged_overlays_section_by_section_and_leaves_its_arguments() -> None:
    below = {"train": {"lr": 1, "seed": 2}, "out_dir": "a"}
    assert config.merged(below, {"train": {"lr": 3}}) == {"train": {"lr": 3, "seed": 2}, "out_dir": "a"}
    assert below == {"train": {"lr": 1, "seed": 2}, "out_dir": "a"}


def test_settings_survive_yaml(tmp_path: Path) -> None:
    run = config.build(RunConfig, small(model={"rope": {"scaling": "yarn", "factor": 2}}, train={"lr": 3e-5, "grad_clip": None}), "line")
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(run), encoding="utf-8")
    assert config.build(RunConfig, config.read_yaml(path), "config.yaml") == run


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"train:\n\tlr: 1\n", "not YAML at line 2"),
        (b"- a\n- b\n", "holds no settings"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_a_file_that_is_no_settings_file(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        config.read_yaml(path)
    assert caught.value.where == str(path)
    assert caught.value.problem.startswith(problem)
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_its_nearest_neighbour(tmp_path: Path) -> None:
    (tmp_path / "model_1b.yaml").write_text("{}")
    with pytest.raises(UserError, match=r"no such file; did you mean .*model_1b\.yaml\?"):
        config.read_yaml(tmp_path / "model_1B.yaml")
    with pytest.raises(UserError, match=r"cannot be read .*give the path of a YAML file"):
        config.read_yaml(tmp_path)


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    assert config.read_yaml(path) == {}


def test_derived_sizes() -> None:
    model = ModelConfig(
        d_model=1536, n_layer=1, n_head=24, n_kv_head=8, d_ff=4096, original_seq_len=4096, rope=RopeConfig(scaling="yarn", factor=4)
    )
    assert (model.head_width, model.max_seq_len) == (64, 16_384)
    assert ModelConfig(d_model=1000, n_layer=1, n_head=16, n_kv_head=8, head_dim=128, d_ff=4096).head_width == 128
    assert model.weight_std == pytest.approx(0.3 / 1536**0.5)
    assert DataConfig(source="x").shard_tokens == 2**24


def test_only_what_differs_from_the_defaults_is_shown() -> None:
    tokenizer = config.TokenizerConfig(kind="bpe")
    assert config.changed(tokenizer) == {"kind": "bpe"}
    prepare = config.PrepareConfig(tokenizer=tokenizer, data=config.DataConfig(source="text"))
    assert config.changed(prepare) == {"tokenizer.kind": "bpe", "data.source": "text"}


def test_a_slip_in_a_section_is_named_before_what_it_leaves_unset() -> None:
    slipped = {"modle" if name == "model" else name: section for name, section in SMALL.items()}
    assert str(refusal(slipped)) == "modle: unknown setting (in a.yaml); did you mean model?"


def test_a_base_may_lie_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "b.yaml").write_text("train: {lr: 0.5, seed: 3}\n")
    (tmp_path / "a.yaml").write_text("base: ~/b.yaml\ntrain: {seed: 4}\n")
    assert config.read_yaml(tmp_path / "a.yaml") == {"train": {"lr": 0.5, "seed": 4}}


def test_a_base_that_leads_back_to_itself_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(UserError, match=r"b\.yaml: its base a\.yaml leads back to it; name another file as base"):
        config.read_yaml(tmp_path / "a.yaml")
    (tmp_path / "c.yaml").write_text(f"base: ../{tmp_path.name}/c.yaml\n")
    with pytest.raises(UserError, match=r"c\.yaml: its base \.\./\w+/c\.yaml leads back to it; name another file as base"):
        config.read_yaml(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3: 4", "3 is not the name of a setting"),
        ("a: !!python/object/apply:os.system ['true']", "not YAML at line 1"),
        ("train: {tokens: 5}\ntrain: {lr: 1}", "'train' stands there twice, the second time at line 2; leave one of them out"),
        ("train:\n  lr: 1\n  lr: 2", "'lr' stands there twice, the second time at line 3"),
        ("a: \x00", "not YAML"),
        ("[" * 5000, "not YAML"),
        ("a: !!bool maybe", "not YAML"),
        ("a: !!int", "not YAML"),
    ],
    ids=["number", "object", "section twice", "setting twice", "NUL", "deep", "no bool", "no int"],
)
def test_yaml_that_is_no_settings_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        config.read_yaml(tmp_path / "a.yaml")


def test_a_folder_with_a_comma_in_its_name_is_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a, b").mkdir()
    for typed, folders in (("a, b", ["a, b"]), ("a, c", ["a", "c"]), ("a,", ["a"])):
        assert config.build(config.ReportOptions, {"runs": typed, "out_dir": "x"}, "command line").runs == tuple(map(Path, folders))


def test_numbers_and_dates_in_yaml_are_what_is_written() -> None:
    """YAML 1.1 has octal numbers, numbers of base 60 and dates, which nobody means here."""
    text = "a: 0100\nb: 04:00:00\nc: 2024-01-01\nd: 1_000\ne: 0x10\nf: 0\ng: -5\nh: 1e6\ni: 0.5\nj: 20:48\nk: 4:00.5"
    expected = {"a": "0100", "b": "04:00:00", "c": "2024-01-01", "d": 1000, "e": 16, "f": 0, "g": -5, "h": "1e6", "i": 0.5, "j": "20:48"}
    assert config.yaml_values(text, Path("a.yaml")) == expected | {"k": "4:00.5"}
    assert config.build(RunConfig, small(train={"tokens": "0100"}), "a.yaml").train.tokens == 100


def test_an_error_is_one_line_whatever_is_in_it() -> None:
    assert str(UserError("a\nb", "\x1b[31m is not \ud800 valid", "choose é")) == "a\\nb: \\x1b[31m is not \\ud800 valid; choose é"
