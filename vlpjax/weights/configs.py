"""Fields of other libraries' configs that families of all kinds read and write: activations, defaults, refusals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlpjax.errors import UserError

# Their names of activations -> ours; the first with a value is the name that is written.
ACTIVATIONS = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "squared_relu",
}


def filled_in(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the values of the fields that it leaves out (`transformers` may write only what differs)."""
    return {**defaults, **{name: value for name, value in config.items() if value is not None}}


def require(family: str, config: Mapping[str, Any], **only: Any) -> None:
    """The only values of these fields that can be represented; a field that is not there, or null, has it.

    Raises:
      UserError: another value.
    """
    for field, value in only.items():
        found = config.get(field)
        if found is not None and found != value:
            raise UserError(f"The {family} config has {field}={found!r}; only {value!r} can be represented.")


def activation_named(family: str, name: Any) -> str:
    """Our name of their activation.

    Raises:
      UserError: one that there is not.
    """
    if name not in ACTIVATIONS:
        raise UserError(
            f"The {family} config has the activation {name!r}; there are {', '.join(ACTIVATIONS)}."
        )
    return ACTIVATIONS[name]


def their_activation(name: str) -> str:
    """Their name of our activation.

    Raises:
      UserError: one that they have not.
    """
    for theirs, ours in ACTIVATIONS.items():
        if ours == name:
            return theirs
    raise UserError(
        f"The activation {name!r} has no counterpart; there are {', '.join(ACTIVATIONS.values())}."
    )
