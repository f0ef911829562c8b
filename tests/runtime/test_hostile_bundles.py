"""Bundles made to do harm, whose hashes are right: no reader follows where they lead, or fails in a way of its own."""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import xxhash
from synthetic import Weights, write_bundle

import titans_runtime as rt
from titans_export.bundle import MANIFEST, read_bundle
from titans_export.errors import BundleError
from titans_export.trust import bundle_sha256

SECRET = np.arange(96, dtype=np.float32)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "small.titans", Weights.random())


def seal(bundle: Path, manifest: dict[str, Any] | None = None) -> None:
    """Makes sizes and hashes right for the files as they are."""
    values = manifest or json.loads((bundle / MANIFEST).read_text())
    for name in values["files"]:
        raw = (bundle / name).read_bytes()
        values["files"][name] = {"bytes": len(raw), "xxh3_128": xxhash.xxh3_128_hexdigest(raw)}
    (bundle / MANIFEST).write_text(json.dumps(values))


def refuse(bundle: Path, *words: str) -> str:
    """Both readers refuse it, and the one in Python says these words. Gives what the runtime says."""
    with pytest.raises(BundleError) as caught:
        read_bundle(bundle)
    for word in words:
        assert word in str(caught.value)
    with pytest.raises(rt.Error) as failed:
        rt.Session(bundle)
    assert failed.value.status == 1
    return str(failed.value)


class TestExternalData:
    """Where a graph says that its tensors' data lies, ONNX Runtime goes."""

    def point(self, bundle: Path, location: str, where: str = "initializer") -> None:
        """Has a tensor of the graph `decode` lie there."""
        model = onnx.load(str(bundle / "decode.onnx"), load_external_data=False)
        tensor = onnx.TensorProto(name="stolen", data_type=onnx.TensorProto.FLOAT, dims=[96])
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", "0"), ("length", str(SECRET.nbytes))):
            tensor.external_data.add(key=key, value=value)
        if where == "initializer":
            model.graph.initializer.append(tensor)
        else:
            model.graph.node.append(onnx.helper.make_node("Constant", [], ["stolen"], value=tensor))
        (bundle / "decode.onnx").write_bytes(model.SerializeToString())
        seal(bundle)

    def refuse(self, bundle: Path, location: str) -> None:
        """The runtime refuses it before ONNX Runtime sees the graph, which may have rules of its own."""
        said = refuse(bundle, "decode.onnx", location)
        assert said.startswith(
            "[decode.onnx] data of stolen outside the bundle: expected it in the file or in weights.safetensors"
        )
        assert location[:50] in said

    @pytest.mark.parametrize("where", ["initializer", "constant"])
    def test_outside(self, bundle: Path, where: str) -> None:
        (bundle.parent / "secret.bin").write_bytes(SECRET.tobytes())
        self.point(bundle, "../secret.bin", where)
        self.refuse(bundle, "../secret.bin")

    def test_an_absolute_path(self, bundle: Path, tmp_path: Path) -> None:
        (tmp_path / "secret.bin").write_bytes(SECRET.tobytes())
        self.point(bundle, str(tmp_path / "secret.bin"))
        self.refuse(bundle, str(tmp_path / "secret.bin"))

    def test_a_file_that_is_not_listed(self, bundle: Path) -> None:
        (bundle / "more.bin").write_bytes(SECRET.tobytes())
        self.point(bundle, "more.bin")
        self.refuse(bundle, "more.bin")

    def test_a_link_that_leads_out(self, bundle: Path, tmp_path: Path) -> None:
        (tmp_path / "secret.bin").write_bytes(SECRET.tobytes())
        (bundle / "link.bin").symlink_to(tmp_path / "secret.bin")
        self.point(bundle, "link.bin")
        self.refuse(bundle, "link.bin")

    @pytest.mark.skipif(sys.maxsize < 2**32, reason="the address is of 64 bits")
    def test_an_address_in_memory(self, bundle: Path) -> None:
        """The mark by which ONNX Runtime tells itself that data is in memory already, at the offset."""
        self.point(bundle, "*/_ORT_MEM_ADDR_/*")
        self.refuse(bundle, "_ORT_MEM_ADDR_")

    def test_more_than_the_file_has(self, bundle: Path) -> None:
        model = onnx.load(str(bundle / "decode.onnx"), load_external_data=False)
        tensor = onnx.TensorProto(name="much", data_type=onnx.TensorProto.FLOAT, dims=[1 << 20])
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", "weights.safetensors"), ("offset", str(1 << 40)), ("length", str(4 << 20))):
            tensor.external_data.add(key=key, value=value)
        model.graph.initializer.append(tensor)
        # Part of what comes out, so that nobody leaves it out.
        for node in model.graph.node:
            node.output[:] = ["before" if name == "logits" else name for name in node.output]
        model.graph.node.append(onnx.helper.make_node("ReduceSum", ["much"], ["sum"], keepdims=0))
        model.graph.node.append(onnx.helper.make_node("Add", ["before", "sum"], ["logits"]))
        (bundle / "decode.onnx").write_bytes(model.SerializeToString())
        seal(bundle)
        # In a process of its own, which a read beyond the mapping would end.
        program = "import sys, titans_runtime as rt\ntry: rt.Session(sys.argv[1])\nexcept rt.Error: sys.exit(9)"
        done = subprocess.run([sys.executable, "-c", program, str(bundle)], capture_output=True, timeout=60)
        assert done.returncode == 9, done.stderr.decode()


class TestOperators:
    """ONNX Runtime has operators that trust their inputs, so a session opens none that this project does not write."""

    def add(self, bundle: Path, *nodes: onnx.NodeProto) -> None:
        model = onnx.load(str(bundle / "decode.onnx"), load_external_data=False)
        model.graph.node.extend(nodes)
        if any(node.domain for node in nodes):
            model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
        (bundle / "decode.onnx").write_bytes(model.SerializeToString())
        seal(bundle)

    @pytest.mark.parametrize(
        "domain, name",
        [
            ("com.microsoft", "GroupQueryAttention"),
            ("com.microsoft", "DecoderMaskedMultiHeadAttention"),
            ("", "MaxUnpool"),
            ("", "NonZero"),
        ],
    )
    def test_of_others(self, bundle: Path, domain: str, name: str) -> None:
        node = onnx.helper.make_node(name, ["logits"], ["more"], domain=domain)
        self.add(bundle, node)
        assert "TITANS-E0210" in refuse(bundle, "TITANS-E0210", "com.microsoft" if domain else name)
        output = onnx.helper.make_tensor_value_info("more", onnx.TensorProto.FLOAT, None)
        self.replace(bundle, node, onnx.helper.make_graph([node], "branch", [], [output]))
        assert "TITANS-E0210" in refuse(bundle, "TITANS-E0210")

    def replace(self, bundle: Path, node: onnx.NodeProto, branch: onnx.GraphProto) -> None:
        """Moves the last node into the branches of an If."""
        model = onnx.load(str(bundle / "decode.onnx"), load_external_data=False)
        del model.graph.node[-1]
        model.graph.node.append(
            onnx.helper.make_node("If", ["learn"], ["more"], then_branch=branch, else_branch=branch)
        )
        (bundle / "decode.onnx").write_bytes(model.SerializeToString())
        seal(bundle)

    def test_of_ones_own_open_with_the_option(self, bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
        expected = rt.Session(bundle).stream().feed([1, 2, 3])
        self.add(bundle, onnx.helper.make_node("NonZero", ["logits"], ["more"]))
        with pytest.raises(rt.Error, match="TITANS-E0210"):
            rt.Session(bundle)
        with caplog.at_level("WARNING", "titans_runtime"):
            session = rt.Session(bundle, operators="any")
        assert "any operator" in caplog.text
        assert np.array_equal(session.stream().feed([1, 2, 3]), expected)
        with pytest.raises(rt.Error, match="TITANS-E0502"):
            rt.Session(bundle, operators="all")

    def test_encodings_that_parsers_read_differently(self, bundle: Path) -> None:
        raw = (bundle / "decode.onnx").read_bytes()
        tag = (6 << 3 | 2) | (1 << 34)
        long = bytes(((tag >> shift) & 0x7F) | (0x80 if shift < 35 else 0) for shift in range(0, 36, 7))
        for changed in (raw + long + b"\x01x", raw + b"\xf8\x3f\x01", raw + b"\x08\x0a", b"\x88\x00" + raw[1:]):
            (bundle / "decode.onnx").write_bytes(changed)
            seal(bundle)
            assert "TITANS-E0209" in refuse(bundle, "TITANS-E0209")


def test_another_bundle_than_expected(bundle: Path) -> None:
    """The hash is the one that coreutils print and titans-export computes."""
    command = "LC_ALL=C; export LC_ALL; sha256sum * | sha256sum"
    printed = subprocess.run(["sh", "-c", command], cwd=bundle, capture_output=True, text=True, check=True).stdout
    digits = printed.split()[0]
    assert bundle_sha256(bundle, read_bundle(bundle).manifest) == digits
    for good in (digits, digits.upper(), None):
        rt.Session(bundle, expect_sha256=good).close()
    for wrong in (digits[:-1], digits + "0", "", "x" * 64):
        with pytest.raises(rt.Error, match="TITANS-E0502"):
            rt.Session(bundle, expect_sha256=wrong)
    with pytest.raises(rt.Error, match="TITANS-E0211") as caught:
        rt.Session(bundle, expect_sha256=digits[::-1])
    assert digits in str(caught.value)
    manifest = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps(manifest | {"producer": "another"}))  # another file with right hashes
    with pytest.raises(rt.Error, match="TITANS-E0211"):
        rt.Session(bundle, expect_sha256=digits)


@pytest.mark.parametrize("name", [MANIFEST, "decode.onnx", "state.safetensors"])
class TestFilesThatAreNone:
    def test_a_pipe(self, bundle: Path, name: str) -> None:
        (bundle / name).unlink()
        os.mkfifo(bundle / name)
        refuse(bundle, name)

    @pytest.mark.parametrize("target", ["/dev/zero", "/etc/passwd", "weights.safetensors"])
    def test_a_link(self, bundle: Path, name: str, target: str) -> None:
        (bundle / name).unlink()
        (bundle / name).symlink_to(target)
        refuse(bundle, name)

    def test_a_folder(self, bundle: Path, name: str) -> None:
        (bundle / name).unlink()
        (bundle / name).mkdir()
        refuse(bundle, name)


def test_json_without_end(bundle: Path) -> None:
    for text in ("[" * 2_000_000, '{"a":' * 500_000, '{"format": NaN}', "1" * 100_000):
        (bundle / MANIFEST).write_text(text)
        refuse(bundle, MANIFEST)


def test_a_manifest_without_end(bundle: Path) -> None:
    with (bundle / MANIFEST).open("r+b") as file:
        file.truncate(1 << 40)
    refuse(bundle, MANIFEST)


def test_a_key_that_is_there_twice(bundle: Path) -> None:
    text = (bundle / MANIFEST).read_text()
    (bundle / MANIFEST).write_text('{"weights": {"file": "other"}, ' + text[1:])
    refuse(bundle, "twice")


def test_a_file_with_holes(bundle: Path) -> None:
    os.truncate(bundle / "state.safetensors", 1 << 40)
    refuse(bundle, "state.safetensors")


INTERESTING: list[Any] = [
    None, True, 0, -1, 1, 1 << 31, 1 << 63, 10**30, 0.5, "", ".", "..", "a/b", "a\0b", "\ud800", "x" * 5000, [], {},
    [0], [[]], {"file": []}, {"kind": "file", "file": "decode.onnx"},
]  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a JSON value with each of its keys."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def test_no_manifest_fails_in_a_way_of_its_own(bundle: Path) -> None:
    """A thousand manifests, each wrong at a place or two, are read or refused."""
    original = json.loads((bundle / MANIFEST).read_text())
    original["engines"] = [
        {
            "name": "cpu", "target": "cpu", "compiler": "onnxruntime", "compiler_version": "1.20.0",
            "precision": "fp32", "device": "cpu", "sm": [], "platform": "linux-x86_64", "memory": "either",
            "weights": None, "graphs": [{"graph": "decode", "file": "decode.onnx"}],
        }
    ]  # fmt: skip
    draw = random.Random(0)
    refused = 0
    for _ in range(1000):
        manifest = copy.deepcopy(original)
        for _ in range(draw.choice((1, 1, 2))):
            container, key = draw.choice(list(places(manifest)))
            if draw.random() < 0.2:
                del container[key]
            else:
                container[key] = draw.choice(INTERESTING)
        (bundle / MANIFEST).write_text(json.dumps(manifest))
        try:
            read_bundle(bundle)
        except BundleError:
            refused += 1
    assert 400 < refused < 1000


def test_a_bundle_takes_no_memory_by_what_it_says(bundle: Path) -> None:
    """Sizes far beyond the files, in a process that may not have much."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["state"][0]["shape"] = [1, 1, 1 << 58]
    del manifest["state"][0]["layout"]
    seal(bundle, manifest)
    header = (1 << 60).to_bytes(8, "little") + b"{}"
    program = "import sys, titans_runtime as rt\ntry: rt.Session(sys.argv[1])\nexcept rt.Error: sys.exit(9)"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30))

    for content in (None, header):
        if content is not None:
            (bundle / "state.safetensors").write_bytes(content)
            seal(bundle)
        done = subprocess.run(
            [sys.executable, "-c", program, str(bundle)], capture_output=True, timeout=60, preexec_fn=limit
        )
        assert done.returncode == 9, done.stderr.decode()


def test_no_code_inside_of_engines_is_allowed() -> None:
    """TensorRT runs libraries that an engine file holds only where this was called."""
    root = Path(__file__).parents[2]
    sources = [*root.glob("runtime/src/**/*.cpp"), *root.glob("runtime/src/**/*.h"), *root.glob("plugins/**/*.c*")]
    assert len(sources) > 50
    assert [path for path in sources if "EngineHostCodeAllowed" in path.read_text()] == []
