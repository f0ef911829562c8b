"""The files of weights in a folder, as trainers lay it out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ...errors import CheckpointError, MissingCheckpointError

INDEX = ".index.json"
_STANDARD = "model.safetensors"
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
# Files of training that are no model.
_TRAINING = re.compile(
    r"^(optim|scheduler|scaler|sampler|random_states|rng_state|training_args|custom_checkpoint|dl_state|dataloader)"
)
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")
_DEEPSPEED = re.compile(r"(bf16_)?(zero_pp_rank_\d+_)?mp_rank_\d+(_|$).*\.pt|layer_\d+-model_\d+-model_states\.pt")
_LATEST = "latest"
_LONGEST_TAG = 255


@dataclass(frozen=True)
class Found:
    """Files of weights. index: the file that assigns tensors to shards, or None. notes: what to tell the user."""

    files: tuple[Path, ...]
    index: Path | None = None
    notes: tuple[str, ...] = ()


def find_weights(path: Path) -> Found:
    """The files of weights at `path`, a file or a folder. Raises CheckpointError."""
    if path.is_dir():
        return _in_folder(path)
    if not path.is_file():
        problem = f"{path} is not a regular file" if path.exists() else f"no such file or folder: {path}"
        raise MissingCheckpointError("E0301", "checkpoint", problem, "give the file of weights, or its folder")
    if path.name.endswith(INDEX):
        return Found((), path)
    if _DEEPSPEED.fullmatch(path.name):
        return _deepspeed(path.parent, [path])
    return Found((path,))


def _in_folder(folder: Path) -> Found:
    names = sorted(entry.name for entry in folder.iterdir())
    if states := [folder / name for name in names if _DEEPSPEED.fullmatch(name)]:
        return _deepspeed(folder, states)
    if _LATEST in names and (tagged := _tagged(folder)) is not None:
        return find_weights(tagged)
    if any(name.endswith(".distcp") for name in names):
        raise _distributed(folder)
    indices = [folder / name for name in names if name.endswith(INDEX)]
    safe = [index for index in indices if ".safetensors." in index.name]
    if indices:
        chosen = safe or indices
        if len(chosen) > 1:
            raise _several(folder, [index.name for index in chosen])
        return Found((), chosen[0])
    weights = [name for name in names if name.endswith(_SUFFIXES) and not _TRAINING.match(name)]
    if not weights:
        raise _none(folder, names)
    if shards := _shards(folder, weights):
        return Found(shards)
    if len(weights) > 1 and _STANDARD in weights:
        others = [name for name in weights if name != _STANDARD]
        return Found((folder / _STANDARD,), notes=(f"{_STANDARD} is read, not {', '.join(others)} beside it",))
    if len(weights) > 1:
        raise _several(folder, weights)
    return Found((folder / weights[0],))


def _several(folder: Path, names: list[str]) -> CheckpointError:
    problem = f"several files of weights in {folder}: {', '.join(names)}"
    return CheckpointError("E0315", "checkpoint", problem, "give the path of one of them")


def _none(folder: Path, names: list[str]) -> CheckpointError:
    inside = [folder / name for name in names if (folder / name).is_dir()]
    if partitioned := next((one for one in inside if any(one.glob("*.distcp"))), None):
        return _distributed(partitioned)
    better = [one for one in inside if any(file.name.endswith((*_SUFFIXES, INDEX)) for file in one.iterdir())]
    fix = f"give one of {', '.join(str(one) for one in better)}" if better else "give the path of the file itself"
    problem = f"no weights in {folder}: expected model.safetensors, pytorch_model.bin or one file of {_kinds()}"
    return MissingCheckpointError("E0301", "checkpoint", problem, fix)


def _kinds() -> str:
    return ", ".join(_SUFFIXES[:-1]) + f" or {_SUFFIXES[-1]}"


def _shards(folder: Path, names: list[str]) -> tuple[Path, ...]:
    """All shards of one model, without an index; empty if the files are not that."""
    parts = [_SHARD.fullmatch(name) for name in names]
    groups = {(part[1], part[3], part[4]) for part in parts if part is not None}
    if len(groups) != 1 or None in parts:
        return ()
    stem, count, suffix = next(iter(groups))
    if int(count) > len(names) + 1_000:
        count = f"{len(names) + 1_000:05}"
    wanted = [f"{stem}-{number:05}-of-{count}{suffix}" for number in range(1, int(count) + 1)]
    if missing := next((name for name in wanted if name not in names), None):
        problem = f"a shard of {folder} is missing: {missing}"
        raise MissingCheckpointError("E0317", "checkpoint", problem, "copy all shards into the folder")
    return tuple(folder / name for name in wanted)


def _distributed(folder: Path) -> CheckpointError:
    return CheckpointError(
        "E0316",
        "checkpoint",
        f"{folder} is a distributed checkpoint (FSDP), whose tensors are cut into pieces",
        f"join them: python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} joined.pt",
    )


def _tagged(folder: Path) -> Path | None:
    """The folder that DeepSpeed's file `latest` names, or None if it is another program's file."""
    file = folder / _LATEST
    if not file.is_file():
        return None
    with file.open("rb") as text:
        tag = text.read(_LONGEST_TAG + 1).decode("utf-8", "replace").strip()
    if not tag or len(tag) > _LONGEST_TAG or tag in (".", "..") or set(tag) & set("/\\\0\n"):
        problem = f"{file} names no folder beside it: {tag[:60]!r}"
        raise CheckpointError("E0317", "checkpoint", problem, "give the path of the folder with the model states")
    if not (folder / tag).is_dir():
        problem = f"{file} names a folder that is missing: {tag}"
        raise MissingCheckpointError(
            "E0301", "checkpoint", problem, "give the path of the folder with the model states"
        )
    return folder / tag


def _deepspeed(folder: Path, states: list[Path]) -> Found:
    """The one file with the whole model among DeepSpeed's files of a step."""
    names = [file.name for file in states]
    root = folder.parent if (folder.parent / _LATEST).is_file() else folder
    script = root / "zero_to_fp32.py"
    join = f"python {script if script.is_file() else 'zero_to_fp32.py'} {root} joined"
    partitioned = next((name for name in names if re.match(r"(bf16_)?zero_pp_rank_\d+_.*model_states", name)), None)
    models = [file for file in states if re.fullmatch(r"mp_rank_\d+_model_states\.pt", file.name)]
    if partitioned is not None or not (models or any(name.startswith("layer_") for name in names)):
        problem = f"{folder / (partitioned or names[0])} is a shard of DeepSpeed's ZeRO, not a whole model"
        raise CheckpointError("E0316", "checkpoint", problem, f"join the shards: {join}")
    if len(models) != 1 or any(name.startswith("layer_") for name in names):
        problem = f"{folder} holds a model that DeepSpeed cut into parallel parts: {', '.join(names[:3])}"
        raise CheckpointError("E0316", "checkpoint", problem, "save it whole, from a run without model parallelism")
    note = f"ZeRO's float32 copy of the weights is in shards beside {models[0].name}; to use it: {join}"
    zero = any("zero_pp_rank" in entry.name for entry in models[0].parent.iterdir())
    return Found((models[0],), notes=(note,) if zero else ())
