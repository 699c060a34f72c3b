"""The fields of a `Config` as options of a command: ``@takes(config=FitConfig)``."""

import inspect
from collections.abc import Callable
from dataclasses import Field, fields
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

from nestling.config import Config


def takes(**classes: type[Config]) -> Callable[[Callable], Callable]:
    """Put the fields of configs in the place of parameters of a command, which is given the objects.

    Args:
        classes: parameter: the class of its value.
    """

    def change(command: Callable) -> Callable:
        hints = get_type_hints(command, include_extras=True)
        parameters: list[inspect.Parameter] = []
        for name, parameter in inspect.signature(command).parameters.items():
            if name in classes:
                parameters += [_parameter(option_, classes[name]) for option_ in _options(classes[name])]
            else:
                parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hints[name]))

        @wraps(command)
        def run(**given: Any) -> Any:
            objects = {name: _config(class_, given) for name, class_ in classes.items()}
            return command(**given, **objects)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return change


def _options(class_: type[Config]) -> list[Field]:
    return [option_ for option_ in fields(class_) if option_.metadata.get("cli") is not False]


def _parameter(option_: Field, class_: type[Config]) -> inspect.Parameter:
    metadata = option_.metadata
    kind = metadata["cli"] or get_type_hints(class_)[option_.name]
    name = option_.name.replace("_", "-")
    flags = metadata["flags"] or ((f"--{name}/--no-{name}",) if kind is bool and option_.default else (f"--{name}",))
    annotation = Annotated[kind, typer.Option(*flags, help=metadata["help"])]  # type: ignore[valid-type]
    return inspect.Parameter(
        option_.name, inspect.Parameter.KEYWORD_ONLY, default=option_.default, annotation=annotation
    )


def _config(class_: type[Config], given: dict[str, Any]) -> Config:
    """The object of a command's options, which are taken out of ``given`` and checked by the names they have there."""
    values = {option_.name: given.pop(option_.name) for option_ in _options(class_)}
    for option_ in _options(class_):
        value, check = values[option_.name], option_.metadata["check"]
        if check is not None and not (value is None and option_.default is None):
            values[option_.name] = check(_flag(option_), value)
    return class_(**values)


def _flag(option_: Field) -> str:
    flags = option_.metadata["flags"]
    return flags[0].partition("/")[0] if flags else f"--{option_.name.replace('_', '-')}"
