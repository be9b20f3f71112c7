"""Values to settings and back: YAML files, layers over one another, and the first fault as one line."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from minifoundation.errors import UserError

S = TypeVar("S", bound=BaseModel)


def build(kind: type[S], values: dict[str, Any], sources: str, *, section: str = "") -> S:
    """Return ``kind`` made from nested ``values``; the first fault becomes a one-line UserError.

    Args:
        sources: where the values came from, for the message (``configs/x.yaml, command line``).
        section: put before the names of settings in the message (``train.``).
    """
    try:
        return kind.model_validate(values)
    except ValidationError as invalid:
        fault = _readable(kind, invalid, sources)
        raise UserError(section + fault.where, fault.problem, fault.remedy) from None


def _readable(kind: type[BaseModel], invalid: ValidationError, sources: str) -> UserError:
    faults = invalid.errors(include_url=False)
    fault = next((one for one in faults if one["type"] == "extra_forbidden"), faults[0])  # a slip in a name also leaves another one unset
    path = [str(part) for part in fault["loc"] if part not in ("int", "literal['auto']") and not isinstance(part, int)]
    name = ".".join(path) or sources
    match fault["type"]:
        case "extra_forbidden":
            leaves = dotted_names(kind)
            if name in leaves:  # in one word, where a section belongs
                section, _, leaf = name.rpartition(".")
                return UserError(
                    name, f"stands by its dotted name (in {sources})", f"write '{section}:', and '{leaf}: value' below it, indented"
                )
            near = nearest(name, [*leaves, *dict.fromkeys(leaf.rsplit(".", 1)[0] for leaf in leaves if "." in leaf)])
            return UserError(name, f"unknown setting (in {sources})", f"did you mean {near}?" if near else "--help lists the settings")
        case "missing":
            inside = [(leaf, field) for leaf, field in fields(kind) if leaf.startswith(f"{name}.")]
            needed = [leaf for leaf, field in inside if field.is_required()] + [leaf for leaf, _ in inside if leaf in flags(kind)]
            name = (needed or [name])[0]
            flag = flags(kind).get(name)
            spelled = f"--{flag} or --{name}" if flag and flag != name else f"--{name}"
            how = "give it with" if sources == "command line" else "set it in the YAML or with"
            return UserError(name, f"required and not set (in {sources})", f"{how} {spelled}")
        case "model_type" if fault["input"] is None:
            return UserError(name, "has nothing below it", "write 'name: value' below it, indented, or leave it out")
        case "path_type":
            return UserError(name, f"{fault['input']!r} is not a path", "write a path, in quotation marks where YAML reads something else")
        case "model_type":
            return UserError(
                name, f"{fault['input']!r} is not a section of settings", f"write '{name}:', and below it 'name: value', indented"
            )
        case "value_error":
            problem, _, remedy = str(fault["ctx"]["error"]).partition("; ")
            return UserError(name, problem, remedy or "correct it")
        case _:
            alternatives = [
                other["msg"] for other in invalid.errors(include_url=False) if other["loc"][: len(path)] == fault["loc"][: len(path)]
            ]
            remedy = ", or ".join(message[0].lower() + message[1:] for message in alternatives)
            return UserError(name, f"{fault['input']!r} is not valid", remedy)


ELSEWHERE = {
    **dict.fromkeys(("steps", "max_steps", "total_steps", "epochs", "num_epochs", "num_train_epochs", "max_tokens"), "tokens"),
    **dict.fromkeys(("learning_rate", "max_lr", "peak_lr"), "lr"),
    **dict.fromkeys(("gradient_accumulation_steps", "accumulate_grad_batches", "accumulation_steps"), "grad_accum"),
    **dict.fromkeys(("per_device_train_batch_size", "micro_batch_size", "device_batch_size"), "batch_size"),
    **dict.fromkeys(("block_size", "context_length", "max_seq_length", "max_length", "sequence_length"), "seq_len"),
    **dict.fromkeys(("warmup_steps", "warmup_ratio", "warmup_iters"), "warmup"),
    **dict.fromkeys(("max_grad_norm", "clip_grad"), "grad_clip"),
    **dict.fromkeys(("output_dir", "output", "save_dir"), "out_dir"),
    **dict.fromkeys(("dataset", "dataset_name", "corpus", "train_data"), "source"),
    **dict.fromkeys(("hidden_size", "n_embd", "dim"), "d_model"),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers"), "n_layer"),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_heads"), "n_head"),
    **dict.fromkeys(("num_key_value_heads", "n_kv_heads"), "n_kv_head"),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "hidden_dim"), "d_ff"),
    **dict.fromkeys(("mixed_precision", "fp16", "dtype"), "precision"),
    **dict.fromkeys(("num_workers", "num_proc"), "workers"),
    **dict.fromkeys(("save_steps", "save_interval"), "save_every"),
    **dict.fromkeys(("eval_steps", "eval_interval"), "eval_every"),
    **dict.fromkeys(("logging_steps", "log_interval"), "log_every"),
    **dict.fromkeys(("resume_from_checkpoint", "resume_from"), "resume"),
    **dict.fromkeys(("checkpoint", "ckpt_path"), "ckpt"),
}
"""What the Trainer of transformers, nanoGPT and others call a setting, and its last part here."""
MISSPELT = 0.85
"""How alike two names are, of 1, if one is the other misspelt."""


def nearest(name: str, known: list[str]) -> str | None:
    """Return the known dotted name most like ``name``: the same last part in another section, or what others call so, or a misspelt one."""
    leaf, leaves = name.rsplit(".", 1)[-1], [other.rsplit(".", 1)[-1] for other in known]
    if leaf not in leaves:
        theirs = [] if get_close_matches(leaf, leaves, n=1, cutoff=MISSPELT) else get_close_matches(leaf, ELSEWHERE, n=1, cutoff=MISSPELT)
        meant = ELSEWHERE.get(leaf) or (ELSEWHERE[theirs[0]] if theirs else None)
        if meant in leaves:
            return known[leaves.index(meant)]
    same_leaf = [other for other in known if other.rsplit(".", 1)[-1] == leaf]
    close = same_leaf or get_close_matches(name, known, n=1, cutoff=0.6)
    close = close or [k for k in known if k.rsplit(".", 1)[-1] in get_close_matches(leaf, leaves, n=1)]
    return close[0] if close else None


def fields(kind: type[BaseModel], prefix: str = "") -> list[tuple[str, Any]]:
    """Return (dotted name, pydantic field) of every leaf setting of ``kind``, in order."""
    found: list[tuple[str, Any]] = []
    for name, field in kind.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += fields(inner, f"{prefix}{name}.")
        else:
            found.append((prefix + name, field))
    return found


def dotted_names(kind: type[BaseModel]) -> list[str]:
    """Return the dotted name of every leaf setting of ``kind``."""
    return [name for name, _ in fields(kind)]


def flags(kind: type[BaseModel]) -> dict[str, str]:
    """Return the short flag (without dashes) of each setting of ``kind`` that has one, by dotted name."""
    return {name: field.json_schema_extra["flag"] for name, field in fields(kind) if field.json_schema_extra}


def read_yaml(path: Path, *, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the nested settings in a YAML file; a line ``base: other.yaml`` puts them over those of a file beside it.

    Args:
        above: the files whose base this is.

    Raises:
        UserError: the file is missing, not YAML, not a mapping, or its own base.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        raise UserError(
            str(path), "no such file", f"did you mean {path.parent / near[0]}?" if near else "give the path of a YAML file"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(str(path), f"cannot be read ({error})", "give the path of a YAML file") from None
    values = yaml_values(text, path)
    base = values.pop("base", None)
    if base is None:
        return values
    below = path.parent / Path(str(base)).expanduser()
    if below.resolve() in [file.resolve() for file in (*above, path)]:
        raise UserError(str(path), f"its base {base} leads back to it", "name another file as base, or leave it out")
    return merged(read_yaml(below, above=(*above, path)), values)


class _Twice(Exception):
    """A name that stands twice."""

    def __init__(self, name: str, line: int) -> None:
        super().__init__(f"{name!r} stands there twice, the second time at line {line}")


def yaml_values(text: str, path: Path) -> dict[str, Any]:
    """Return the nested settings in the text of a YAML file.

    Raises:
        UserError: it is not YAML, not a mapping, or says something twice.
    """
    import yaml

    class Once(yaml.SafeLoader):
        """Refuses a name that stands twice in one section, of which YAML would keep the last."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if key.value in seen:
                        raise _Twice(key.value, key.start_mark.line + 1)
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

    def as_written(_loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
        return str(node.value)

    def number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
        """Return what YAML 1.2 reads: 0100 is no octal number, and 4:00:00 none of base 60."""
        if re.match(r"[-+]?0[\d_]|.*:", node.value):
            return str(node.value)
        return loader.construct_yaml_int(node)

    def fraction(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
        return str(node.value) if ":" in node.value else loader.construct_yaml_float(node)

    Once.add_constructor("tag:yaml.org,2002:timestamp", as_written)
    Once.add_constructor("tag:yaml.org,2002:int", number)
    Once.add_constructor("tag:yaml.org,2002:float", fraction)

    try:
        values = yaml.load(text, Once)  # a SafeLoader
    except _Twice as twice:
        raise UserError(str(path), str(twice), "leave one of them out, or put both below one name") from None
    except (yaml.YAMLError, ValueError, LookupError, RecursionError) as error:
        place = getattr(error, "problem_mark", None)
        line = f" at line {place.line + 1}" if place else ""
        raise UserError(str(path), f"not YAML{line}", "indent with spaces, one 'name: value' a line") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(str(path), "holds no settings", "write 'section:' lines with 'name: value' below them")
    if not all(isinstance(name, str) for name in values):
        raise UserError(
            str(path), f"{next(name for name in values if not isinstance(name, str))!r} is not the name of a setting", "--help lists them"
        )
    return values


ALTERNATIVES = (("source", "mix"), ("grad_accum", "tokens_per_step"))
"""Settings of one section of which one is given: ``--data`` on the command line puts aside the ``data.mix`` of a YAML file."""

WHOLE = ("mix",)
"""Settings that hold names of the user's own: one mixture takes the place of another and is not mixed with it."""


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return ``below`` overlaid by ``above``, section by section; a setting also replaces the one it is an alternative to."""
    result = dict(below)
    for name, other in (*ALTERNATIVES, *((b, a) for a, b in ALTERNATIVES)):
        if above.get(name) not in (None, "none"):
            result.pop(other, None)
    for name, value in above.items():
        inner = result.get(name)
        if isinstance(inner, dict) and isinstance(value, dict) and name not in WHOLE:
            value = merged(inner, value)
        result[name] = value
    return result


def changed(settings: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Return the settings that are not at their default, by dotted name."""
    found: dict[str, Any] = {}
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            found |= changed(value, f"{prefix}{name}.")
        elif field.is_required() or value != field.default:
            found[prefix + name] = value
    return found


def to_yaml(settings: BaseModel) -> str:
    """Return ``settings`` as YAML that reads back equal."""
    import yaml

    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
