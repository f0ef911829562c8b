"""State dicts inside of what a trainer saved: which there are, which one is meant, and prefixes of names.

Each state dict has an address: the keys that lead to it, and its prefix, such as "state_dict/ema_model".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import CheckpointError

# Keys of the model's own state dict in files of trainers: plain PyTorch, Lightning, DeepSpeed and others.
WRAPPERS = (
    "model",
    "state_dict",
    "model_state_dict",
    "model_state",
    "module",
    "net",
    "network",
    "weights",
    "params",
)
# Prefixes of DistributedDataParallel, torch.compile, Lightning, Fabric, FSDP, EMA copies, and modules around a model.
_PREFIXES = {
    "module",
    "_orig_mod",
    "model",
    "net",
    "network",
    "_forward_module",
    "_fsdp_wrapped_module",
    "online_model",
    "student",
}
_AVERAGED = re.compile(r"(?<![a-z])(ema|swa|averaged?|polyak|shadow|teacher)(?![a-z])")
_OTHER = re.compile(
    r"^optim|optimizer|sched|scaler$|^rng|random|^(loops|hyper_parameters|config|args|amp|param_shapes)$"
)
# Counters of an average, beside its tensors.
_COUNTERS = {"n_averaged", "initted", "step", "num_updates", "decay", "update_num"}
_DEEPEST = 4
_FILE = "the file"  # the address of a state dict that is the whole file
StateDict = dict[str, Tensor]


def find_state_dicts(loaded: Any) -> dict[str, StateDict]:
    """Every state dict in what a file holds, by address."""
    found: dict[str, StateDict] = {}
    _walk(loaded, (), found, set())
    return found


def plain_values(loaded: Any) -> dict[str, Any]:
    """What stands beside the state dicts at the top: a configuration, arguments, counters."""
    if not isinstance(loaded, Mapping):
        return {}
    return {str(name): value for name, value in loaded.items() if not isinstance(value, Tensor)}


def _walk(value: Any, keys: tuple[str, ...], found: dict[str, StateDict], seen: set[int]) -> None:
    if not isinstance(value, Mapping) or len(keys) > _DEEPEST or id(value) in seen:
        return
    seen.add(id(value))
    before = len(found)
    for key, inner in value.items():
        if isinstance(key, str) and not _OTHER.search(key.lower()):
            _walk(inner, (*keys, key), found, seen)
    tensors = {name: _tensor(item) for name, item in value.items() if isinstance(name, str) and _is_tensor(item)}
    # Every model has a tensor of a module inside of it. Tensors beside state dicts are a trainer's.
    if any("." in name for name in tensors) and len(found) == before:
        for prefix, group in split(tensors).items():
            found["/".join((*keys, prefix) if prefix else keys) or _FILE] = group


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.ndim > 0)


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.from_numpy(value)


def split(tensors: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The models that lie side by side in one state dict, such as a model and its EMA copy, by prefix.

    One model has the prefix "". Counters of averages and _extra_state are left out.
    """
    kept = {name: value for name, value in tensors.items() if not _is_counter(name, value)}
    groups: dict[str, dict[str, Any]] = {}
    for name, value in kept.items():
        first, _, rest = name.partition(".")
        groups.setdefault(first, {})[rest] = value
    sides = all(first in _PREFIXES or is_averaged(first) for first in groups)
    if len(groups) < 2 or not sides or any("" in group for group in groups.values()):
        return {"": kept}
    return {first: _with_dots(group, groups) for first, group in groups.items()}


def _is_counter(name: str, value: Any) -> bool:
    shape = getattr(value, "shape", ())
    last = name.rpartition(".")[2]
    return last == "_extra_state" or (last in _COUNTERS and len(shape) <= 1 and all(size == 1 for size in shape))


def _with_dots(group: dict[str, Any], groups: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """LitEma removes the dots from names. The model beside it has them."""
    if any("." in name for name in group):
        return group
    for other in groups.values():
        names = {name.replace(".", ""): name for name in other}
        if len(names) == len(other) and set(group) <= set(names):
            return {names[name]: value for name, value in group.items()}
    return group


def is_averaged(address: str) -> bool:
    """Whether an address is that of an averaged copy, such as EMA."""
    return address.rpartition("/")[2] not in _PREFIXES and bool(_AVERAGED.search(address.lower()))


def strip_prefixes(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The tensors without the prefix that all names have, and that prefix."""
    removed, names = "", {name: name for name in tensors}
    while names:
        firsts = {name.partition(".")[0] for name in names}
        if len(firsts) > 1 or not all("." in name for name in names):
            break
        removed += f"{next(iter(firsts))}."
        names = {name.partition(".")[2]: old for name, old in names.items()}
    return {name: tensors[old] for name, old in names.items()}, removed


def choose(found: Mapping[str, Mapping[str, Any]], wanted: str | None, path: Path) -> str:
    """The address of the state dict to read. Raises CheckpointError if that is not clear.

    wanted: an address or its last part, "ema" for the only averaged copy, or None. None takes the model's own tensors,
    or an averaged copy if there are no others.
    """
    addresses = list(found)
    if wanted is not None:
        return _wanted(addresses, wanted, path)
    own = [address for address in addresses if not is_averaged(address)]
    candidates = own or addresses
    if len(candidates) > 1:
        usual = [address for address in candidates if address.rpartition("/")[2] in (*WRAPPERS, *_PREFIXES)]
        depth = min((address.count("/") for address in usual), default=0)
        nearest = [address for address in usual if address.count("/") == depth]
        candidates = nearest if len(nearest) == 1 else candidates
    if len(candidates) != 1:
        raise _unclear(f"several state dicts in {path}", addresses)
    return candidates[0]


def _wanted(addresses: list[str], wanted: str, path: Path) -> str:
    name = wanted.strip("./")
    if name in addresses:
        return name
    matches = [address for address in addresses if address.rpartition("/")[2] == name]
    if not matches and name == "ema":
        matches = [address for address in addresses if is_averaged(address)]
    if len(matches) != 1:
        raise _unclear(f"{'several state dicts' if matches else 'no state dict'} {wanted!r} in {path}", addresses)
    return matches[0]


def _unclear(problem: str, addresses: list[str]) -> CheckpointError:
    listed = ", ".join(addresses)
    return CheckpointError("E0315", "checkpoint", f"{problem}: it has {listed}", "give one of these as --weights NAME")
