"""What a model keeps of the number of its layers, where some are taken out.

Models of transformers do: a layer knows its place, for its cache; the configuration says how many
layers there are, and has lists with an entry for each. Which entries these are is found by trying:
what the class builds of the new configuration has to have the weights that are left.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from stochastic_depth.torch_private.trees import PLAIN_VALUES

_NUMBERS = ("layer_idx", "layer_id", "layer_index")  # as which a layer knows its place
_OWN_COUNTS = ("num_layers", "n_layers", "n_layer")  # in the module around the layers
_COUNTS = ("layer", "depth", "block")  # in the name of an entry that may say how many there are

Change = dict[str, Any]
"""New values of some entries of a configuration."""


def configured(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The outermost modules around these with a configuration that describes them."""
    found = (next(filter(_config, way(model, name)), None) for name in names)
    return [owner for owner in {id(o): o for o in found if o}.values() if not unlike(owner)]


def way(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules around one, outermost first, and that one."""
    names = name.split(".") if name else []
    return (model.get_submodule(".".join(names[:end])) for end in range(len(names) + 1))


def _config(module: nn.Module) -> Any:
    config = vars(module).get("config")
    return config if hasattr(config, "to_dict") else None


def unlike(owner: nn.Module, *, also_values: bool = False) -> str:
    """In what a module differs from what its class makes of its configuration; nothing: in none.

    Args:
        owner: The module.
        also_values: Whether to look at the numbers that its parts keep, too.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):  # some draw all the same
            twin = type(owner)(_as_loaded(_config(owner)))
    except Exception as error:  # whatever a class does not take
        return f"{type(error).__name__}: {error}"
    sizes = [{k: v.shape for k, v in each.state_dict().items()} for each in (twin, owner)]
    if other := sorted(sizes[0].items() ^ sizes[1].items()):
        return f"{other[0][0]} is not the same"
    parts = dict(owner.named_modules())
    for name, part in twin.named_modules() if also_values else ():
        mine = vars(parts.get(name, part))
        for key, value in vars(part).items():
            values = value if isinstance(value, tuple) else (value,)  # the sizes of a kernel
            is_number = all(isinstance(each, PLAIN_VALUES) for each in values)
            if is_number and key != "training" and key[0] != "_" and mine.get(key) != value:
                return f"{name}.{key} is {mine.get(key)}, not {value}"
    return ""


def _as_loaded(config: Any) -> Any:
    """A configuration as it is when it was saved and is read again."""
    read = getattr(type(config), "from_dict", copy.deepcopy)
    return read(copy.deepcopy(config.to_dict() if read is not copy.deepcopy else config))


def own_configs(model: nn.Module, undo: ExitStack) -> None:
    """Give a model configurations of its own: another may have the same."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        if config := _config(module):
            put(module, {"config": copy.deepcopy(config, memo)}, undo)


def put(holder: Any, change: Change, undo: ExitStack) -> None:
    """Set attributes, which can be undone."""
    for name, value in change.items():
        undo.callback(setattr, holder, name, vars(holder)[name])
        setattr(holder, name, value)


def tell(
    model: nn.Module, path: str, around: Sequence[nn.Module], left: list[int], size: int,
    undo: ExitStack,
) -> None:  # fmt: skip
    """Write the new number of layers, and each layer's own, where a model keeps these.

    Args:
        model: The model, without the layers that are taken out.
        path: Where their list was.
        around: The modules around it, outermost first, and the list itself.
        left: The old numbers of those that are left.
        size: How many there were.
        undo: Takes it back.
    """
    *holders, layers = around
    for number, layer in enumerate(layers.children()):
        for module in layer.modules():
            mine = {n: number for n in _NUMBERS if vars(module).get(n) == left[number]}
            put(module, mine, undo)
    for name in _OWN_COUNTS:
        if holders and vars(holders[-1]).get(name) == size:
            put(holders[-1], {name: len(left)}, undo)
    owner = next(filter(_config, holders), None)
    if owner is None:
        return
    configs = list({id(c): c for c in map(_config, holders) if c}.values())
    inside = path.split(".")[holders.index(owner) :]
    guesses = [_guesses(config, inside, left, size) for config in configs]
    for changes in zip_longest(*guesses, fillvalue={}):
        with ExitStack() as attempt:
            for config, change in zip(configs, changes, strict=True):
                put(config, change, attempt)
            if not unlike(owner):
                undo.push(attempt.pop_all())
                return


def _guesses(config: Any, path: list[str], left: list[int], size: int) -> list[Change]:
    """Changes of a configuration, of which one may be the right one: the likely ones first."""
    entries = vars(config)
    counts = [
        name
        for name, value in entries.items()
        if type(value) is int and value == size and any(part in name for part in _COUNTS)
    ]
    of_decoder = [name for name in counts if "decoder" in name]
    is_decoder = any("decoder" in part for part in path) and of_decoder
    likely = of_decoder if is_decoder else [name for name in counts if name not in of_decoder]
    lists: Change = {
        name: [value[place] for place in left]
        for name, value in entries.items()
        if isinstance(value, list) and len(value) == size
    }
    stages: list[Change] = []  # of a model in stages: how many each has
    for name, value in entries.items():
        for place in (int(part) for part in path if part.isdecimal()):
            is_list = isinstance(value, list | tuple) and place < len(value)
            if is_list and type(value[place]) is int and value[place] == size:
                changed = [*value[:place], len(left), *value[place + 1 :]]
                is_count = any(part in name for part in _COUNTS)
                stages.insert(0 if is_count else len(stages), {name: type(value)(changed)})
    by_layer = {name: value for name, value in lists.items() if "layer" in name}
    return [
        {**dict.fromkeys(likely, len(left)), **by_layer},
        {**dict.fromkeys(likely, len(left)), **lists},
        *stages,
        *({name: len(left), **some} for name in counts for some in (by_layer, lists)),
    ]
