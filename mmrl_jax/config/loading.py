"""Loads config files by name or path, and checks the overrides of the command line.

A config file is a Python file with a function `get_config()` that returns an
`ml_collections.ConfigDict`. The command line overrides single keys (`--config.ppo.clip=0.1`).
"""

import ast
from collections.abc import Iterable, Mapping, Sequence
import importlib
import importlib.util
import inspect
import os
import pathlib
import sys
import traceback
import types
from typing import Any

import ml_collections

from mmrl_jax.config.schema import ConfigLike, Elsewhere, flatten, nearest, unknown_key_message

# Directory of the public configs, which are part of the package and are found by name.
PUBLIC = pathlib.Path(__file__).parents[1] / "configs"


def resolve(spec: str) -> str:
    """Returns the path of a config file, followed by ':argument' if `spec` has one.

    Args:
      spec: Path of the file, or name of a public config, e.g. 'reach_ppo'; either may be followed
        by ':argument'.
    """
    path, colon, argument = spec.partition(":")
    public = PUBLIC / f"{path.removesuffix('.py')}.py"
    if not pathlib.Path(path).is_file() and public.is_file():
        path = str(public)
    return f"{path}{colon}{argument}"


def load_config(spec: str) -> ml_collections.ConfigDict:
    """Loads a config by path or name, see `resolve`, as `config_flags` does.

    Raises:
        ValueError: If the file cannot be loaded, see `load_module`, or `get_config` needs an
            argument that is missing or does not accept the given one.
    """
    path, _, argument = resolve(spec).partition(":")
    get_config = load_module(pathlib.Path(path)).get_config
    arguments = (argument,) if argument else ()
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError as error:
        remedy = f"give '{path}' alone" if argument else f"give '{path}:ARGUMENT'"
        raise ValueError(
            f"Config file '{spec}' does not fit its get_config() ({error}): {remedy}."
        ) from error
    return get_config(*arguments)


def load_module(path: pathlib.Path) -> types.ModuleType:
    """Executes a config file and returns its module.

    Raises:
        ValueError: If the file does not exist (the message gives the nearest name), cannot be
            executed (the message gives the line), or has no `get_config`.
    """
    if not path.is_file():
        siblings = [str(x) for x in path.parent.glob("*.py")] if path.parent.is_dir() else []
        public = [other.stem for other in PUBLIC.glob("[a-z]*.py")]
        guess = nearest(str(path), [*siblings, *public])
        hint = f" Did you mean '{guess}'?" if guess is not None else ""
        raise ValueError(f"No config file '{path}'.{hint}")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    if module_spec is None or module_spec.loader is None:
        raise ValueError(f"Config file '{path}' is not a Python file: give one that ends in .py.")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(
            f"Config file '{path}' cannot be executed: {describe_failure(error)}."
        ) from error
    if not hasattr(module, "get_config"):
        raise ValueError(f"Config file '{path}' has no get_config(): add one.")
    return module


def describe_failure(error: Exception) -> str:
    """Describes an error in executing a user's module in one line, with file and line number."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} ({error.filename}:{error.lineno})"
    text = " ".join(f"{type(error).__name__}: {error}".split())
    # Frames of the import system are left out, because they are not in the user's file.
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen") and frame.filename != importlib.__file__
    ]
    location = f" ({frames[-1].filename}:{frames[-1].lineno})" if len(frames) > 1 else ""
    return f"{text}{location}"


def import_module(name: str, key: str) -> types.ModuleType:
    """Imports a user's module that is installed or in the current directory.

    Args:
        name: Name of the module.
        key: Config key that names it, for the error message.

    Raises:
        ValueError: If the module cannot be imported.
    """
    if "" not in sys.path and os.getcwd() not in sys.path:
        # The path of a console command begins with the directory of its script instead.
        sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except Exception as error:  # Importing executes the user's module.
        raise ValueError(
            f"{key} has {name!r}, which cannot be imported ({describe_failure(error)}); name a "
            "module that is installed or in the current directory."
        ) from error


def import_object(spec: str, key: str) -> Any:
    """Imports an object of a user's module, see `import_module`.

    Args:
        spec: The object, as 'module:name'.
        key: Config key that names it, for the error message.

    Raises:
        ValueError: If `spec` has no name, the module cannot be imported, or it has no such object.
    """
    module_name, _, name = spec.partition(":")
    if not name:
        raise ValueError(f"{key} has {spec!r}, which does not name an object; write 'module:name'.")
    module = import_module(module_name, key)
    if not hasattr(module, name):
        guess = nearest(name, [other for other in vars(module) if not other.startswith("_")])
        hint = f" Did you mean '{module_name}:{guess}'?" if guess is not None else ""
        raise ValueError(f"{key} has {spec!r}, but {module_name!r} has no {name!r}.{hint}")
    return getattr(module, name)


def validate_overrides(
    argv: Sequence[str],
    reference: ConfigLike | None = None,
    *,
    flag: str = "config",
    renamed: Mapping[str, str] = types.MappingProxyType({}),
    elsewhere: Elsewhere = lambda key: None,
) -> None:
    """Checks `--config.a.b=value` arguments; it must be called before absl parses the flags.

    The error of absl for a misspelled key has neither the path of the key nor similar keys, and
    comes with a traceback.

    Args:
        argv: Command line, with or without the name of the program.
        reference: Config that has every valid key; None for that of `--config=FILE` in `argv`,
            without which nothing is checked.
        flag: Name of the config flag.
        renamed: Description of the new key by the key of an earlier version.
        elsewhere: See `schema.unknown_key_message`.

    Raises:
        ValueError: If a key is unknown or is a group. The message has one line for each such key,
            with the nearest valid key.
    """
    if "--" in argv:
        argv = argv[: list(argv).index("--")]
    if reference is None:
        path = _flag_value(argv, flag)
        if path is None:
            return
        reference = load_config(path)
    known = flatten(reference)
    groups = _group_names(known)
    errors = []
    for argument in argv:
        key = _override_key(argument, flag)
        bare = argument.lstrip("-").partition("=")[0]
        if argument.startswith("--") and "." in bare and bare in known:
            errors.append(f"'{argument}' sets no key of the config: write --{flag}.{bare}=VALUE.")
        if key is None or key in known:
            continue
        if key in groups:
            fields = sorted(name for name in known if name.startswith(f"{key}."))
            errors.append(
                f"Config key '{key}' is a group and takes no value. Set one of its fields: "
                f"{', '.join(fields)}."
            )
        else:
            errors.append(unknown_key_message(key, known, renamed=renamed, elsewhere=elsewhere))
    if errors:
        raise ValueError("\n".join(errors))


def _group_names(flat: Iterable[str]) -> set[str]:
    groups: set[str] = set()
    for name in flat:
        parts = name.split(".")
        groups.update(".".join(parts[:i]) for i in range(1, len(parts)))
    return groups


def _flag_value(argv: Sequence[str], flag: str) -> str | None:
    """Returns the last value of `--flag=value`, `-flag=value` or `--flag value`."""
    value = None
    for i, argument in enumerate(argv):
        name, equals, text = argument.partition("=")
        if name in (f"--{flag}", f"-{flag}"):
            if equals:
                value = text
            elif i + 1 < len(argv):
                value = argv[i + 1]
    return value


def _override_key(argument: str, flag: str) -> str | None:
    """Returns `a.b` for `--config.a.b=1`, or for the boolean `--noconfig.a.b`; else None."""
    name = argument.partition("=")[0]
    for start in (f"--{flag}.", f"-{flag}.", f"--no{flag}.", f"-no{flag}."):
        if name.startswith(start):
            return name[len(start) :]
    return None


def overridden(argv: Sequence[str], flag: str = "config") -> set[str]:
    """Returns the keys of the overrides in a command line, `a.b` for `--config.a.b=1`."""
    return {key for argument in argv if (key := _override_key(argument, flag)) is not None}


def override_values(
    argv: Sequence[str], keys: Iterable[str], flag: str = "config"
) -> dict[str, Any]:
    """Returns the values of some overrides in a command line as a nested dictionary.

    Args:
        argv: Command line, with or without the name of the program.
        keys: Keys, with dots, whose values are texts or tuples.
        flag: Name of the config flag.
    """
    values: dict[str, Any] = {}
    for key in keys:
        text = _flag_value(argv, f"{flag}.{key}")
        if text is None:
            continue
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        *groups, name = key.split(".")
        node = values
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = value if isinstance(value, tuple) else text
    return values


def without_flag(argv: Sequence[str], flag: str = "config") -> list[str]:
    """Returns a command line without `--config=SPEC` and `--config SPEC`; overrides remain."""
    kept, follows = [], False
    for argument in argv:
        name, equals, _ = argument.partition("=")
        if follows:
            follows = False
        elif name in (f"--{flag}", f"-{flag}"):
            follows = not equals
        else:
            kept.append(argument)
    return kept


def flag_config(argv: Sequence[str], flag: str = "config") -> ml_collections.ConfigDict | None:
    """Returns the config in a command line without its overrides; None if there is no config flag.

    Raises:
        ValueError: If the config cannot be loaded, see `load_config`.
    """
    spec = _flag_value(argv, flag)
    return None if spec is None else load_config(spec)


def wants_help(argv: Sequence[str]) -> bool:
    """Returns whether a command line has a help flag."""
    return any(argument in ("--help", "-help", "-h", "-?", "--helpfull") for argument in argv)
