"""Checkpoints as trainers leave them, in every format: layouts, averages, pickles, shards, and hostile ones.

The layouts are those that accelerate 1.15, Lightning 2.6, ema-pytorch, torch.optim.swa_utils and DeepSpeed write.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import pickle
import re
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from titans_export.checkpoints import LoadOptions, load_checkpoint, titans
from titans_export.checkpoints.weights import open_weights
from titans_export.errors import CheckpointError, MissingCheckpointError
from titans_export.model import MemoryConfig, ModelConfig, Titans

State = dict[str, Tensor]
CONFIG = ModelConfig(
    variant="lmm", vocab_size=16, dim=8, layers=1, hidden=8, memory=MemoryConfig(heads=1, head_dim=4, chunk=1)
)
LAYOUTS: dict[str, Callable[[State, Path], Path]] = {}


def layout(save: Callable[[State, Path], Path]) -> Callable[[State, Path], Path]:
    LAYOUTS[save.__name__] = save
    return save


def random_state(seed: int = 0) -> State:
    torch.manual_seed(seed)
    return {name: torch.randn_like(value) for name, value in Titans(CONFIG).state_dict().items()}


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def pickled(value: Any, folder: Path, name: str = "model.pt", **options: Any) -> Path:
    torch.save(value, folder / name, **options)
    return folder / name


def optimizer_of(state: State) -> dict[str, Any]:
    optimizer = torch.optim.Adam([nn.Parameter(value.clone()) for value in state.values()])
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


def shards(state: State, folder: Path, name: str, save: Callable[[State, Path], object]) -> dict[str, str]:
    """Three files with the tensors in turn. Returns the weight_map."""
    names = sorted(state)
    where = {}
    for number in range(3):
        file = name.format(f"-{number + 1:05}-of-00003")
        part = names[number::3]
        save({key: state[key] for key in part}, folder / file)
        where |= dict.fromkeys(part, file)
    return where


def indexed(state: State, folder: Path, stem: str = "model{}.safetensors") -> Path:
    """What accelerate and Hugging Face write for large models."""
    save: Callable[[State, Path], object] = save_file if stem.endswith(".safetensors") else torch.save
    where = shards(state, folder, stem, save)
    size = sum(value.nbytes for value in state.values())
    index = folder / (stem.format("") + ".index.json")
    index.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": where}))
    return index


@layout
def distributed_and_compiled(state: State, folder: Path) -> Path:
    return pickled(prefixed("module._orig_mod.", state), folder)


@layout
def fully_sharded_but_whole(state: State, folder: Path) -> Path:
    return pickled({"model_state": prefixed("_fsdp_wrapped_module.module.", state)}, folder)


@layout
def lightning(state: State, folder: Path) -> Path:
    values = {
        "epoch": 0, "global_step": 2, "pytorch-lightning_version": "2.6.6", "loops": {"fit_loop": {"state_dict": {}}},
        "state_dict": OrderedDict(prefixed("net._orig_mod.", state)),
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(1.0)}},
        "optimizer_states": [optimizer_of(state)], "lr_schedulers": [], "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 1e-3, "dim": 8},
    }  # fmt: skip
    return pickled(values, folder, "last.ckpt")


@layout
def lightning_fabric(state: State, folder: Path) -> Path:
    return pickled({"model": prefixed("_forward_module.model.", state), "iteration": 7}, folder, "fabric.ckpt")


@layout
def accelerate_save_state(state: State, folder: Path) -> Path:
    save_file(state, folder / "model.safetensors")
    pickled(optimizer_of(state), folder, "optimizer.bin")
    pickled({"last_epoch": 1}, folder, "scheduler.bin")
    (folder / "random_states_0.pkl").write_bytes(pickle.dumps({"step": 1}))
    return folder


@layout
def accelerate_save_state_without_safetensors(state: State, folder: Path) -> Path:
    pickled(optimizer_of(state), folder, "optimizer.bin")
    return pickled(OrderedDict(state), folder, "pytorch_model.bin").parent


@layout
def accelerate_save_model(state: State, folder: Path) -> Path:
    return indexed(state, folder).parent


@layout
def an_index(state: State, folder: Path) -> Path:
    return indexed(state, folder)


@layout
def shards_of_pickles(state: State, folder: Path) -> Path:
    return indexed(state, folder, "pytorch_model{}.bin").parent


@layout
def shards_without_an_index(state: State, folder: Path) -> Path:
    shards(prefixed("model.", state), folder, "model{}.safetensors", save_file)
    return folder


@layout
def hugging_face(state: State, folder: Path) -> Path:
    save_file(prefixed("model.", state), folder / "model.safetensors", metadata={"format": "pt"})
    pickled(state, folder, "training_args.bin")
    pickled(random_state(1), folder, "pytorch_model.bin")  # an older copy
    pickled(random_state(2), folder, "resume.pt")
    (folder / "generation_config.json").write_text("{}")
    return folder


@layout
def hugging_face_cache(state: State, folder: Path) -> Path:
    """snapshots/REVISION has links to blobs/HASH."""
    snapshot, blobs = folder / "snapshots" / "abc", folder / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    indexed(state, snapshot)
    for number, file in enumerate(sorted(snapshot.glob("*.safetensors"))):
        file.rename(blobs / str(number))
        file.symlink_to(Path("../../blobs") / str(number))
    return snapshot


@layout
def deepspeed(state: State, folder: Path) -> Path:
    step = folder / "global_step2"
    step.mkdir()
    (folder / "latest").write_text("global_step2")
    values = {
        "module": OrderedDict(prefixed("module.", state)), "buffer_names": [], "optimizer": optimizer_of(state),
        "param_shapes": [OrderedDict((name, value.shape) for name, value in state.items())], "lr_scheduler": None,
        "sparse_tensor_module_names": set(), "skipped_steps": 0, "global_steps": 2, "dp_world_size": 1,
        "mp_world_size": 1, "ds_config": {"train_batch_size": 4}, "ds_version": "0.15.0",
    }  # fmt: skip
    pickled(values, step, "mp_rank_00_model_states.pt")
    return folder


@layout
def deepspeed_file(state: State, folder: Path) -> Path:
    return deepspeed(state, folder) / "global_step2" / "mp_rank_00_model_states.pt"


@layout
def swa_utils(state: State, folder: Path) -> Path:
    model = nn.Module()
    averaged = AveragedModel(model).state_dict()
    return pickled({"n_averaged": averaged["n_averaged"], **prefixed("module.", state)}, folder)


@layout
def ema_alone(state: State, folder: Path) -> Path:
    """ema-pytorch with include_online_model=False."""
    extra = {"initted": torch.tensor(True), "step": torch.tensor([3])}
    return pickled({**extra, **prefixed("ema_model.", state)}, folder)


@layout
def tensors_beside_values(state: State, folder: Path) -> Path:
    return pickled({**state, "epoch": 3, "config": {"lr": 0.1}, "best": 1.5}, folder)


@layout
def arrays(state: State, folder: Path) -> Path:
    return pickled({"params": {name: value.numpy() for name, value in state.items()}}, folder)


@layout
def older_format_under_any_key(state: State, folder: Path) -> Path:
    return pickled({"my_titans": state, "step": 1}, folder, "step1.pth", _use_new_zipfile_serialization=False)


@layout
def safetensors_by_another_name(state: State, folder: Path) -> Path:
    save_file(state, folder / "weights.bin")
    return folder / "weights.bin"


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_read(name: str, tmp_path: Path) -> None:
    state = random_state()
    path = LAYOUTS[name](state, tmp_path)
    (tmp_path / "given.json").write_text(json.dumps(CONFIG.to_json()))
    loaded = load_checkpoint(path, "titans", LoadOptions(config=str(tmp_path / "given.json")))
    found = loaded.model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)
    assert re.fullmatch("[0-9a-f]{64}", loaded.weights_sha256)
    assert loaded.origin.dtypes == ("float32",)
    again = open_weights(path)
    again.release()  # tensors can be read after it
    assert all(torch.equal(again.tensors[key], state[key]) for key in state)


def test_the_configuration_lies_beside_or_in_the_checkpoint(tmp_path: Path) -> None:
    state, config = random_state(), CONFIG.to_json()
    for name, values in {"config": {"config": config}, "hparams": {"hyper_parameters": {"config": config}}}.items():
        (tmp_path / name).mkdir()
        titans.load(pickled({"model": state, **values}, tmp_path / name))
    root = tmp_path / "deepspeed"
    root.mkdir()
    path = deepspeed(state, root)
    with pytest.raises(MissingCheckpointError, match=r"config\.json"):
        titans.load(path)
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text("{}")
    assert titans.load(path).tokenizer == path / "tokenizer.json"


# Address to read, for what a user gives as --weights; None: the file is refused as unclear.
AVERAGES: dict[str, tuple[Callable[[State, State], dict[str, Any]], dict[str | None, str | None]]] = {
    "beside": (
        lambda own, ema: {"model": own, "model_ema": ema, "optimizer": {"state": {}}},
        {None: "model", "ema": "model_ema", "model_ema": "model_ema", "model": "model", "swa": None},
    ),
    "timm": (
        lambda own, ema: {"state_dict": own, "state_dict_ema": ema},
        {None: "state_dict", "ema": "state_dict_ema"},
    ),
    "ema_pytorch": (
        lambda own, ema: {"initted": torch.tensor(True), "step": torch.tensor(3)}
        | prefixed("online_model.", own)
        | prefixed("ema_model.", ema),
        {None: "online_model", "ema": "ema_model", "ema_model.": "ema_model"},
    ),
    "ema_pytorch beside": (
        lambda own, ema: {"model": own, "ema": prefixed("online_model.", own) | prefixed("ema_model.module.", ema)},
        {None: "model", "ema": "ema/ema_model", "ema/ema_model": "ema/ema_model", "online_model": "ema/online_model"},
    ),
    "lightning": (
        lambda own, ema: {"state_dict": prefixed("net.", own) | prefixed("ema_net.", ema)},
        {None: "state_dict/net", "ema": "state_dict/ema_net"},
    ),
    "lit_ema": (
        lambda own, ema: prefixed("model.", own)
        | {"model_ema." + name.replace(".", ""): value for name, value in ema.items()}
        | {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(3)},
        {None: "model", "ema": "model_ema"},
    ),
    "two averages": (
        lambda own, ema: {"ema_0.999": ema, "ema_0.9": own},
        {None: None, "ema": None, "ema_0.999": "ema_0.999"},
    ),
    "two models": (
        lambda own, ema: {"generator": own, "critic": ema},
        {None: None, "critic": "critic", "nothing": None},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", AVERAGES)
def test_the_chosen_copy_is_read(name: str, tmp_path: Path) -> None:
    own, ema = random_state(1), random_state(2)
    make, choices = AVERAGES[name]
    path = pickled(make(own, ema), tmp_path)
    copies = [own, ema]
    for wanted, address in choices.items():
        if address is None:
            with pytest.raises(CheckpointError, match=r"it has .*, .*\. Fix: give one of these as --weights.*E0315"):
                open_weights(path, wanted)
            continue
        weights = open_weights(path, wanted)
        assert weights.address == address
        assert len(weights.found) > 1 and any("--weights" in note for note in weights.notes)
        right = ema if "ema" in address.rpartition("/")[2] or address == "critic" else own
        assert weights.tensors.keys() == right.keys()
        assert all(torch.equal(weights.tensors[key], value) for key, value in right.items())
        assert sum(torch.equal(weights.tensors["embedding"], copy["embedding"]) for copy in copies) == 1


def test_a_module_of_a_larger_model_is_read_when_asked_for(tmp_path: Path) -> None:
    state = random_state()
    path = pickled(
        prefixed("backbone.", state) | {"head.weight": torch.ones(2, 2), "loss.scale": torch.ones(1)}, tmp_path
    )
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_json()))
    with pytest.raises(CheckpointError, match="has no tensor"):
        titans.load(path)
    loaded = titans.load(path, LoadOptions(weights="backbone"))
    assert torch.equal(loaded.model.embedding, state["embedding"])
    assert loaded.origin.weights == "backbone"


def test_values_of_trainers_are_read_without_code(tmp_path: Path) -> None:
    """numpy scalars and arrays, an argparse.Namespace, paths, times, defaultdicts and a set, as trainers save them."""
    import datetime

    values = {
        "loss": np.float64(3.5), "steps": np.int64(7), "ok": np.bool_(True), "losses": np.arange(6.0).reshape(2, 3),
        "turned": np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3)), "name": np.str_("ab"),
        "args": argparse.Namespace(lr=1e-3, out=pathlib.PurePosixPath("/a/b"), nested=argparse.Namespace(deep=[1])),
        "more": types.SimpleNamespace(a=1), "when": datetime.timedelta(seconds=3), "torch": torch.__version__,
        "history": defaultdict(list, {"loss": [1, 2]}), "set": {1, 2}, "seeds": (np.random.get_state(), 3),
    }  # fmt: skip
    for zipped in (True, False):
        path = pickled({"model": random_state(), **values}, tmp_path, _use_new_zipfile_serialization=zipped)
        extras = open_weights(path).extras
        assert (extras["loss"], extras["steps"], extras["ok"], extras["name"]) == (3.5, 7, True, "ab")
        assert np.array_equal(extras["losses"], values["losses"])
        assert np.array_equal(extras["turned"], values["turned"]) and extras["turned"].dtype == np.int32
        assert extras["args"] == {"lr": 1e-3, "out": "/a/b", "nested": {"deep": [1]}}
        assert (extras["more"], extras["history"], extras["set"]) == ({"a": 1}, {"loss": [1, 2]}, {1, 2})
        assert str(extras["torch"]) == str(torch.__version__)


class Settings:
    """A class of the trainer's own, which this process has and another would not."""


def run_two_lines(error: CheckpointError, folder: Path) -> Path:
    """Runs the two lines of Python that the error gives."""
    lines = re.findall(r"`([^`]+)`", str(error))
    assert len(lines) == 2 and lines[0].startswith("import torch; ")
    before = os.getcwd()
    os.chdir(folder)
    try:
        exec("\n".join(lines), {})
    finally:
        os.chdir(before)
    return folder / "clean.pt"


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 3)


@pytest.mark.parametrize("kind", ["state dict", "module", "whole module"])
def test_the_two_lines_make_a_clean_file(kind: str, tmp_path: Path) -> None:
    state = Small().state_dict()
    value: Any = {"model_state_dict": state, "settings": Settings()}
    if kind != "state dict":
        module = Small()
        module.load_state_dict(state)
        value = {"net": module} if kind == "module" else module
    path = pickled(value, tmp_path, "it's mine.pt")
    with pytest.raises(
        CheckpointError, match=r"would run code, \S*test_weights\.\w+.*\(no code was run\).*E0303"
    ) as caught:
        open_weights(path)
    tensors = open_weights(run_two_lines(caught.value, tmp_path)).tensors
    assert all(torch.equal(value, state["inner." + name]) for name, value in tensors.items()) and len(tensors) == 2


def refuse(path: Path, message: str, wanted: str | None = None) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_weights(path, wanted)
    assert re.fullmatch(r"\[\w+\] .+\. Fix: .+ \(TITANS-E03\d\d\)", str(caught.value))


def test_a_numpy_pickle_cannot_smuggle_code(tmp_path: Path) -> None:
    """An array of objects would unpickle what is in it."""
    for value in (np.array([Settings()], object), np.dtype("O"), np.zeros(2, [("a", "O")])):
        refuse(pickled({"model": random_state(), "x": value}, tmp_path), "E0303")
    archive = tmp_path / "compressed.pt"
    stored = zipfile.ZipFile(pickled(random_state(), tmp_path))
    with stored as old, zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    refuse(archive, "is compressed, which torch.save never does")
    endless = {"embedding": torch.zeros(()).expand(1 << 20, 1 << 20), "norm.weight": torch.ones(8)}
    refuse(pickled(endless, tmp_path), r"'embedding' of shape \[1048576, 1048576\] repeats its few elements.*E0302")
    twice: list[Any] = [1]
    for _ in range(40):  # 2^40 elements, if each were copied
        twice = [twice, twice]
    assert len(open_weights(pickled({"model": random_state(), "x": twice}, tmp_path)).extras["x"]) == 2


@pytest.fixture
def index(tmp_path: Path) -> Path:
    return indexed(random_state(), tmp_path)


def edit(index: Path, **changes: str | None) -> None:
    values = json.loads(index.read_text())
    for name, file in changes.items():
        values["weight_map"][name.replace("__", ".")] = file
    index.write_text(json.dumps(values))


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "..", "a/b", "a\\b", "a\nb", "", None, 3])
def test_an_index_names_files_beside_it(name: Any, index: Path) -> None:
    edit(index, embedding=name)
    refuse(index, r"assigns 'embedding' to .*expected the name of a file beside it.*E0317")


def test_shards_must_fit(index: Path, tmp_path: Path) -> None:
    original, names = index.read_text(), json.loads(index.read_text())["weight_map"]
    first, second = sorted(set(names.values()))[:2]
    edit(index, extra=first)
    refuse(index, f"shard {first} lacks a tensor 'extra'")
    edit(index, extra="model-00009-of-00009.safetensors")
    refuse(index, "shard model-00009-of-00009.safetensors of .* is missing.*E0317")
    index.write_text(original)
    edit(index, embedding=second if names["embedding"] == first else first)
    refuse(index, "has a tensor 'embedding', which the index has in")
    values = json.loads(original)
    del values["weight_map"]["embedding"]
    index.write_text(json.dumps(values))
    refuse(index, "has a tensor 'embedding', which the index does not list")
    index.write_text(original.replace('"weight_map": {', '"weight_map": {"embedding": "x.safetensors", '))
    refuse(index, 'not a readable index: key "embedding" twice in one object')
    for text in ("{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "[" * 100_000):
        index.write_text(text)
        refuse(index, "E0317")
    index.unlink()
    (tmp_path / second).unlink()
    refuse(tmp_path, f"a shard of .* is missing: {second}")
    (tmp_path / first).rename(tmp_path / second)
    save_file({"embedding": torch.ones(1), "norm.weight": torch.ones(1)}, tmp_path / first)
    save_file({"embedding": torch.ones(1)}, tmp_path / second)
    refuse(tmp_path, f"tensor 'embedding' is in two shards, {first} and {second}")


def test_shards_are_files_of_the_folder(index: Path, tmp_path: Path) -> None:
    shard = next(tmp_path.glob("*.safetensors"))
    inside = tmp_path / "kept"
    shard.rename(inside)
    shard.symlink_to(inside)
    open_weights(index)
    outside = tmp_path.parent / "outside.safetensors"
    inside.rename(outside)
    shard.unlink()
    shard.symlink_to(outside)
    refuse(index, "is a link to .*outside.safetensors, outside of its folder.*E0317")
    shard.unlink()
    os.mkfifo(shard)
    refuse(index, "is not a regular file")
    refuse(shard, "is not a regular file")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "model.pt")
    refuse(tmp_path / "pipe", "is not a regular file")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.pt").symlink_to("nowhere")
    refuse(tmp_path / "broken", "no such file: .*/broken/model.pt")


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_header(path: Path, text: str, data: bytes) -> None:
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + data)


def test_a_header_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(random_state(), path)
    good, data = header_of(path)
    name, other = [key for key in good if key != "__metadata__"][:2]
    for change in (
        {"data_offsets": good[other]["data_offsets"]},  # two tensors in one place
        {"data_offsets": [0, 1 << 40]},
        {"data_offsets": [8, 4]},
        {"shape": [1 << 40, 1 << 40]},
        {"dtype": "F31"},
    ):
        write_header(path, json.dumps({**good, name: {**good[name], **change}}), data)
        refuse(path, "E0302")
    text = json.dumps(good)
    write_header(path, f'{text[:-1]}, "{name}": {json.dumps(good[name])}}}', data)
    refuse(path, f"damaged file .*{name}.* twice|damaged file")
    write_header(path, "[" * 100_000, b"")
    refuse(path, "E0302")


def test_dtypes_may_be_mixed_and_become_float32_exactly(tmp_path: Path) -> None:
    state = random_state()
    halves = [torch.float16, torch.bfloat16, torch.float32]
    mixed = {name: value.to(halves[i % 3]) for i, (name, value) in enumerate(state.items())}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_json()))
    save_file(mixed, tmp_path / "model.safetensors")
    loaded = titans.load(tmp_path)
    for name, value in loaded.model.state_dict().items():
        saved = mixed[name]
        if saved.dtype == torch.bfloat16:  # the upper half of a float32
            bits = saved.view(torch.int16).numpy().astype(np.uint16).astype(np.uint32) << 16
            right = bits.view(np.float32)
        else:
            right = saved.numpy().astype(np.float32)
        assert np.array_equal(value.numpy(), right)
    assert loaded.origin.dtypes == ("bfloat16", "float16", "float32")
    assert loaded.origin.notes == ("weights in bfloat16 and float16 and float32 are converted to float32 exactly",)
    for name, value, message in (
        ("embedding", torch.ones(16, 8, dtype=torch.int32), "wrong dtype of tensor embedding.*got int32.*E0306"),
        ("embedding", torch.ones(16, 8).to(torch.float8_e4m3fn), "got float8_e4m3fn.*E0306"),
        ("embedding", torch.full((16, 8), float("nan"), dtype=torch.bfloat16), "NaN or infinity in tensor embedding"),
        ("embedding", torch.full((16, 8), 1e300, dtype=torch.float64), "NaN or infinity in tensor embedding"),
    ):
        save_file({**state, name: value}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            titans.load(tmp_path)


def test_partitioned_checkpoints_name_the_command_that_joins_them(tmp_path: Path) -> None:
    root = tmp_path / "zero"
    root.mkdir()
    step = deepspeed(random_state(), root) / "global_step2"
    (step / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    notes = open_weights(root).notes  # stages 1 and 2: the model is whole
    assert any(f"python zero_to_fp32.py {root} joined" in note for note in notes)
    refuse(step / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "shard of DeepSpeed's ZeRO.*E0316")
    (step / "mp_rank_01_model_states.pt").touch()
    refuse(root, "parallel parts: .*E0316")
    for name in ("mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"):
        (step / name).unlink()
    (step / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    (root / "zero_to_fp32.py").touch()
    for path in (root, step):
        refuse(path, rf"shard of DeepSpeed's ZeRO.* Fix: join the shards: python {root}/zero_to_fp32.py {root} joined")
    for tag in ("../../etc", "", ".", "x" * 300):
        (root / "latest").write_text(tag)
        refuse(root, "names no folder beside it")
    (root / "latest").write_text("global_step3")
    refuse(root, "names a folder that is missing: global_step3")
    sharded = tmp_path / "fsdp" / "pytorch_model_fsdp_0"
    sharded.mkdir(parents=True)
    (sharded / "__0_0.distcp").touch()
    for path in (sharded, sharded.parent):
        refuse(path, rf"dcp_to_torch {sharded} joined.pt.*E0316")


def test_folders_that_are_not_clear(tmp_path: Path) -> None:
    refuse(tmp_path, "no weights in .*E0301")
    (tmp_path / "checkpoint-500").mkdir()
    save_file(random_state(), tmp_path / "checkpoint-500" / "model.safetensors")
    refuse(tmp_path, f"no weights in .* Fix: give one of {tmp_path}/checkpoint-500")
    for name in ("epoch=0.ckpt", "last.ckpt"):
        pickled({"state_dict": random_state()}, tmp_path, name)
    refuse(tmp_path, "several files of weights in .*: epoch=0.ckpt, last.ckpt.*E0315")
    pickled([3], tmp_path, "list.pt")
    refuse(tmp_path / "list.pt", "no state dict in .*: expected tensors by name, got a list")
    pickled(optimizer_of(random_state()), tmp_path, "optimizer.pt")
    refuse(tmp_path / "optimizer.pt", "no state dict in .*got keys state, param_groups")
    save_file({}, tmp_path / "empty.safetensors")
    refuse(tmp_path / "empty.safetensors", "no tensors in")


def test_the_hash_is_what_sha256sum_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = random_state()
    single = pickled(state, tmp_path / ".." / tmp_path.name, "one.pt")
    wanted = hashlib.sha256(single.read_bytes()).hexdigest()
    folder = tmp_path / "shards"
    folder.mkdir()
    indexed(state, folder)
    command = "sha256sum model-*.safetensors | sha256sum"
    several = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, check=True).stdout.split()
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("a whole file in memory"))
    assert open_weights(single).sha256 == wanted
    assert open_weights(folder).sha256 == several[0]


def peak_of(path: Path) -> int:
    """Bytes that reading all tensors of a checkpoint adds to a process at its peak, mapped pages included."""
    code = (
        "import sys, resource\nfrom pathlib import Path\nfrom titans_export.checkpoints import weights\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "weights._MOST_MAPPED = 1 << 24\nbefore = peak()\nfound = weights.open_weights(Path(sys.argv[1]))\n"
        "for value in found.tensors.float32().values(): value.sum(); del value\n"
        "print(1024 * (peak() - before))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_tensors_are_mapped_and_read_one_by_one(tmp_path: Path) -> None:
    """Of 128 MB in eight tensors, at most three are in memory."""
    state = {f"layers.{i}": torch.ones(1 << 22) for i in range(8)}
    save_file(state, tmp_path / "x.safetensors")
    pickled(state, tmp_path, "x.pt")
    assert peak_of(tmp_path / "x.safetensors") < 56 << 20
    assert peak_of(tmp_path / "x.pt") < 56 << 20
