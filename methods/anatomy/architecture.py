"""Models with shapes that their config cannot say: the table that says them, and the class of model that has them.

The table stands in the config under `pare_architecture` and holds what differs from the model that the rest of the config
describes: {"shapes": {parameter: shape}, "attributes": {module: {attribute: number}}}. Attributes are the numbers that a
module computes with and that the shape of its weights does not tell.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

KEY = "pare_architecture"
WHOLE = "_derived_from"
EPSILON = ("variance_epsilon", "eps")
COUNTS = ("num_heads", "num_key_value_heads", "split_size", "intermediate_size", "hidden_dim", "config.num_attention_heads")
ATTRIBUTES = (*EPSILON, *COUNTS, "head_dim", "scaling")
"""The attributes that a table may set. `config.` stands for the module's own copy of the config."""


def class_for(made: type[nn.Module], config: Any) -> type[nn.Module]:
    """The class that builds the model of a config: `made`, or one derived from it that obeys the config's table."""
    return derived(underived(made)) if getattr(config, KEY, None) else made


def derived(made: Any) -> type[nn.Module]:
    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        made.__init__(self, config, *args, **kwargs)
        reshape(self, getattr(config, KEY))

    said = {"__init__": build, "__module__": made.__module__, "__doc__": made.__doc__, WHOLE: made}
    return type(made.__name__, (made,), said)


def underived(made: type[nn.Module]) -> type[nn.Module]:
    """The class of transformers."""
    whole: type[nn.Module] = getattr(made, WHOLE, made)
    return whole


def filled(made: type[nn.Module], config: Any, weights: Mapping[str, Tensor], dtype: Any) -> Any:
    """The model of a config, with these weights, in evaluation mode.

    Raises:
        ValueError: it has a parameter for which there is no weight.
    """
    builder: Any = class_for(made, config)
    model, said = builder.from_pretrained(None, config=config, state_dict=dict(weights), dtype=dtype, output_loading_info=True)
    if said["missing_keys"]:
        raise ValueError(f"there is no weight for {', '.join(sorted(said['missing_keys'])[:3])} of the {made.__name__}")
    return model.eval()


def reshape(model: nn.Module, table: Mapping[str, Any]) -> None:
    """Gives parameters the shapes and modules the attributes that a table says; the values of such parameters are lost.

    Raises:
        ValueError: the table does not fit the model.
    """
    new: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, shape in table["shapes"].items():
        old = parameters.get(name)
        if old is None or old.dim() != len(shape):
            there = "no such parameter" if old is None else f"a parameter of shape {tuple(old.shape)}"
            raise ValueError(f"{KEY} gives {name} the shape {tuple(shape)}, but {type(model).__name__} has {there} there")
        new[id(old)] = old, nn.Parameter(old.new_zeros(shape), requires_grad=old.requires_grad)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) in new:
                setattr(module, name, new[id(parameter)][1])
        count(module)
    for name, attributes in table["attributes"].items():
        for attribute, value in attributes.items():
            write(model.get_submodule(name), attribute, value, name)


def count(module: nn.Module) -> None:
    """Tells a module the sizes of its weight."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.Conv1d) and module.groups == module.in_channels == module.out_channels:
        module.groups = module.in_channels = module.out_channels = len(module.weight)


def read(module: nn.Module, attribute: str) -> Any:
    """The value of an attribute; None where the module has none of that name."""
    where: Any = getattr(module, "config", None) if attribute.startswith("config.") else module
    return getattr(where, attribute.removeprefix("config."), None)


def write(module: nn.Module, attribute: str, value: Any, name: str) -> None:
    old = read(module, attribute)
    if attribute not in ATTRIBUTES or old is None or type(value) not in (int, float):
        raise ValueError(
            f"{KEY} sets {attribute} of {name} to {value!r}; allowed: a number, for what the module has of "
            f"{', '.join(ATTRIBUTES)}"
        )
    where: Any = module
    if attribute.startswith("config."):
        module.config = where = copy.deepcopy(module.config)
    setattr(where, attribute.removeprefix("config."), value)


def table_for(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], attributes: Mapping[str, Mapping[str, float]]
) -> dict[str, Any] | None:
    """What has to be said of a model to give it these shapes and attributes; None where it has them.

    Raises:
        ValueError: its parameters have other names.
    """
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if parameters.keys() != shapes.keys():
        differing = ", ".join(sorted(parameters.keys() ^ shapes.keys())[:3])
        raise ValueError(f"a {type(model).__name__} of the new config has other parameters than are kept: {differing}, ...")
    different = {
        name: {a: v for a, v in wanted.items() if read(model.get_submodule(name), a) != v}
        for name, wanted in attributes.items()
    }
    table = {
        "shapes": {name: list(shape) for name, shape in shapes.items() if shape != parameters[name]},
        "attributes": {name: wanted for name, wanted in different.items() if wanted},
    }
    return table if any(table.values()) else None
