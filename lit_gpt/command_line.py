"""From a dataclass to a command line: every field a flag, its docstring the help, YAML files for defaults."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, Optional, TypeVar

import jsonargparse

from lit_gpt.errors import UserError

Args = TypeVar("Args")

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


def parse(
    cls: type[Args], argv: list[str], description: str, preset: Optional[Callable[[Args], list[str]]] = None
) -> Args:
    """An instance of dataclass `cls` from the command line.

    Precedence, lowest first: the dataclass, the flags that `preset` returns for the arguments as given, then `--config
    file.yaml` and flags in the order of the command line. A flag of type bool may stand alone: `--debug` means `--debug
    true`.

    Raises:
        UserError: unknown flag, missing or mistyped value.
    """
    parser = jsonargparse.ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file of flags, applied at its place among them.")
    parser.add_class_arguments(cls)
    flags = {f"--{f.name}" for f in fields(cls) if f.type is bool}
    argv = [f"{a}=true" if a in flags and b.startswith("-") else a for a, b in zip(argv, [*argv[1:], "-"])]
    try:
        args = _instance(cls, parser.parse_args(argv))
        if preset is not None:
            args = _instance(cls, parser.parse_args(preset(args) + argv))
    except jsonargparse.ArgumentError as error:
        raise UserError(f"{' '.join(str(error).split())} (--help lists every flag)") from error
    return args


def _instance(cls: type[Args], namespace: Any) -> Args:
    return cls(**{f.name: getattr(namespace, f.name) for f in fields(cls)})
