"""Options of a command: a dataclass whose fields say what argparse is told of each."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection
from dataclasses import MISSING, field
from pathlib import Path
from typing import Any, get_type_hints

import torch

_READ = {kind: read for read in (int, float, Path) for kind in (read, read | None)}  # types whose values are read from text


def option(help: str | None = None, *, default: Any = None, required: bool = False, **told: Any) -> Any:
    """A field with what argparse is told of it; a default may be a function that finds it."""
    own = {} if required else {"default_factory" if callable(default) else "default": default}
    return field(**own, metadata={"help": help, "required": required, **told})


def place(help: str, **told: Any) -> Any:
    """The same by its position."""
    return field(metadata={"help": help, **told})


def texts(help: str, **told: Any) -> Any:
    """Several, which are joined if the option is given again."""
    return option(help, default=(), nargs="+", action="extend", **told)


def device() -> str:
    """Where a command runs by default."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def add_options(parser: argparse.ArgumentParser, kind: type[Any], *, without: Collection[str] = ()) -> None:
    """The arguments of a command: all fields that argparse is told of, but for some."""
    types = get_type_hints(kind)
    for own in dataclasses.fields(kind):
        if not own.metadata or own.name in without:
            continue
        read = {"type": _READ[types[own.name]]} if types[own.name] in _READ else {}
        told: dict[str, Any] = {**read, **own.metadata}
        if "required" not in told:  # what place made
            parser.add_argument(own.name, **told)
            continue
        default = own.default if own.default_factory is MISSING else own.default_factory()
        if not told["required"]:
            told["default"] = [] if default == () else default  # which argparse adds to
        flag = told.pop("name", own.name).replace("_", "-")
        parser.add_argument(f"--{flag}", dest=own.name, **told)


def values_of(args: argparse.Namespace, kind: type[Any]) -> dict[str, Any]:
    """What a command line that was read says of the fields, lists as tuples."""
    told = {own.name: getattr(args, own.name) for own in dataclasses.fields(kind) if hasattr(args, own.name)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
