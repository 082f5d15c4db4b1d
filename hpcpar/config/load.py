"""TOML in and out: files, `base`, and dotted overrides become one checked `Job`."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpcpar.config.job import Job
from hpcpar.errors import UserError, did_you_mean


def load_job(path: str | Path, overrides: Sequence[str] = (), cluster: Path | None = None) -> Job:
    """Read `base`, the job file, a cluster profile and `--table.key value` overrides (in this order of strength).

    A cluster profile is a job file of which only [machine] and [submit] may be written.

    Raises UserError for an unreadable file, an unknown key (with a did-you-mean) or a value of the wrong type.
    """
    tables = _read(Path(path))
    base = tables.pop("base", None)
    if base is not None:
        if not isinstance(base, str):
            raise UserError("base", f"is {json.dumps(base, default=str)}, must be text", 'write base = "other.toml"')
        beneath = _read(Path(path).parent / base)
        if "base" in beneath:
            raise UserError(str(base), "has a base of its own; one level is allowed", "copy its values")
        tables = {**beneath, **{key: _under(beneath.get(key, {}), above) for key, above in tables.items()}}
    if cluster is not None:
        for name, table in _read(cluster, "--cluster: ").items():
            if name not in ("machine", "submit"):
                raise UserError(str(cluster), f"has {name}, but a cluster profile says where a job runs, not what "
                                "it is", "keep [machine] and [submit]")
            tables[name] = _under(tables.get(name, {}), table)
    return _job(tables, overrides)


def job_from_words(overrides: Sequence[str]) -> Job:
    """Build a Job from the defaults and `--table.key value` alone."""
    return _job({}, overrides)


def _job(tables: dict[str, Any], overrides: Sequence[str]) -> Job:
    for dotted, value in parse_overrides(overrides).items():
        table, _, key = dotted.partition(".")
        tables[table] = _under(tables.get(table, {}), {key: value})
    return job_from_tables(tables)


def job_from_tables(tables: Mapping[str, Any]) -> Job:
    """Build a Job from nested tables, checking every key and type."""
    hints = typing.get_type_hints(Job)
    for name in tables.keys() - hints.keys():
        of = [table for table, section in hints.items() if name in typing.get_type_hints(section)]
        if of and not isinstance(tables[name], dict):
            raise UserError(name, "stands in no table", f"write it under [{'] or ['.join(of)}]")
    _known(tables, hints, "")
    return Job(**{name: _section(name, hints[name], table) for name, table in tables.items()})


def override(job: Job, **changes: Mapping[str, Any]) -> Job:
    """Return `job` with some options replaced: override(job, layout={"tp": 4})."""
    return dataclasses.replace(job, **{t: dataclasses.replace(getattr(job, t), **v) for t, v in changes.items()})


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Turn ["--layout.tp", "4", "--optim.lr=1e-4"] into {"layout.tp": 4, "optim.lr": 1e-4}."""
    hints = {f"{table}.{key}": hint for table, section in typing.get_type_hints(Job).items()
             for key, hint in typing.get_type_hints(section).items()}
    found: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise UserError(word, "is not an option", "options look like --layout.tp 4")
        name, equals, text = word[2:].partition("=")
        if name not in hints:
            close = did_you_mean(name, hints)
            raise UserError(f"--{name}", "unknown option",
                            close if close.endswith("?") else "`hpcpar options` lists them")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{name}", "has no value", f"write --{name} VALUE")
            text = rest.pop(0)
        found[name] = _toml_value(hints[name], text)
    return found


def to_toml(job: Job) -> str:
    """Write a job as TOML; reading it back gives the same job."""
    lines = []
    for section in dataclasses.fields(job):
        lines.append(f"[{section.name}]")
        for f in dataclasses.fields(getattr(job, section.name)):
            value = getattr(getattr(job, section.name), f.name)
            if value is not None:
                lines.append(f"{f.name} = {_toml_text(value)}")
        lines.append("")
    return "\n".join(lines)


def describe_options() -> str:
    """List every option with its default and meaning, for `hpcpar help-options` and the docs."""
    lines = []
    for table, section in typing.get_type_hints(Job).items():
        lines.append(f"[{table}]  {section.__doc__}")
        for f in dataclasses.fields(section):
            default = "" if f.default is None else f"(default {json.dumps(f.default)}) "
            lines.append(f"  --{table}.{f.name:<20} {default}{f.metadata['doc']}")
    return "\n".join(lines)


def _read(path: Path, what: str = "") -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not text"
        raise UserError(f"{what}{path}", f"cannot read {'it' if what else 'the job file'}: {reason}",
                        "give the path of a .toml file") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{what}{path}", f"is not TOML: {error}", "mend that line") from None


def _under(beneath: Any, above: Any) -> Any:
    if isinstance(beneath, dict) and isinstance(above, dict):
        return {**beneath, **above}
    return above if isinstance(beneath, dict) else beneath  # what is not a table is refused later, not covered up


def _toml_text(value: Any) -> str:
    # JSON is TOML, but for what lies beyond the basic plane (surrogate pairs) and for DEL; ASCII is safe in any locale
    text = json.dumps(value, ensure_ascii=False)
    return "".join(c if c < "\x7f" else f"\\U{ord(c):08x}" for c in text)


def _toml_value(hint: Any, text: str) -> Any:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string: --train.precision bf16
    if _convert(hint, value) is not None:
        return value
    if _convert(hint, text) is not None:
        return text  # digits where text is wanted: --submit.account 1234
    words = text.split(",")
    return words if _convert(hint, words) is not None else value  # --submit.exclude node7,node9


def _known(table: Any, known: Mapping[str, Any], where: str) -> None:
    if not isinstance(table, Mapping):
        raise UserError(where or "job", "must be a table", f"write [{where}]")
    for key in table:
        if key not in known:
            kind = "option" if where else "table"
            raise UserError(f"{where}.{key}".lstrip("."), f"unknown {kind}", did_you_mean(key, known))


def _section(name: str, section: type, table: Any) -> Any:
    hints = typing.get_type_hints(section)
    _known(table, hints, name)
    values = {key: _checked(f"{name}.{key}", hints[key], raw) for key, raw in table.items()}
    built = section(**values)
    for f in dataclasses.fields(built):
        low, value = f.metadata["low"], getattr(built, f.name)
        if low is not None and isinstance(value, int | float) and value < low:
            raise UserError(f"{name}.{f.name}", f"is {value}, must be at least {low}", f"write {f.name} = {low}")
    return built


def _checked(where: str, hint: Any, raw: Any) -> Any:
    """Return `raw` as the type that `hint` names, or raise a UserError that says what is wanted."""
    value = _convert(hint, raw)
    if value is None:
        raise UserError(where, f"is {json.dumps(raw, default=str)}, must be {_wanted(hint)}", _nearest(hint, raw))
    return value


def _nearest(hint: Any, raw: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return did_you_mean(str(raw), map(str, typing.get_args(hint)))
    return f"for example {_example(hint)}"


def _convert(hint: Any, raw: Any) -> Any:
    """Return the value, or None where it does not fit: None itself is never written in a file."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return next((v for v in (_convert(a, raw) for a in args if a is not type(None)) if v is not None), None)
    if origin is typing.Literal:
        return raw if any(raw == a and type(raw) is type(a) for a in args) else None
    if origin is tuple:
        if not isinstance(raw, list | tuple):
            return None
        inner = [args[0]] * len(raw) if args[-1] is Ellipsis else list(args)
        values = [_convert(h, r) for h, r in zip(inner, raw, strict=False)]
        return None if len(inner) != len(raw) or any(v is None for v in values) else tuple(values)
    if hint is float and type(raw) in (int, float):
        try:
            return float(raw) if math.isfinite(raw) else None
        except OverflowError:  # a whole number beyond all floats
            return None
    return raw if type(raw) is hint else None


def _wanted(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_wanted(a) for a in args if a is not type(None))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is tuple:
        return f"a list of {_wanted(args[0])}" if args[-1] is Ellipsis else f"[{', '.join(map(_wanted, args))}]"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[hint]


def _example(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _example(args[0])
    if origin is tuple:
        return f"[{', '.join(_example(a) for a in args if a is not Ellipsis)}]"
    if origin is typing.Literal:
        return json.dumps(args[0])
    return {int: "1", float: "0.1", str: '"name"', bool: "true"}[hint]
