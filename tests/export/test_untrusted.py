"""What readers refuse in files of others: names, JSON, encodings and operators; and the hash that pins a bundle."""

from __future__ import annotations

import json
import random
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from google.protobuf.descriptor import FieldDescriptor
from manifests import manifest_json
from onnx import TensorProto, helper
from test_manifest import full, places

from titans_export import names, strict_json, trust
from titans_export.errors import BundleError, UsageError
from titans_export.manifest import parse_manifest
from titans_export.onnx.encoding import FIELDS, parse_model
from titans_export.onnx.external import check_external_data
from titans_export.operators import OPERATORS, allowed
from titans_export.operators.allowed import check_operators

# Texts, which only errors and tables show: they may have any characters that are not hidden.
TEXTS = re.compile(
    r"producer|model\.(name|source\..*)|.*xxh3_128|.*\.weights\[\d+\]|quantization\.(recipe|matmuls)\..*|.*\.config\..*"
)
RUNTIME = Path(__file__).resolve().parents[2] / "runtime" / "src"
HOSTILE = {
    "up": "../x", "absolute": "/etc/passwd", "backslash": "..\\x", "dot": ".", "dots": "..", "empty": "",
    "newline": "a\nb", "return": "a\rb", "escape": "\x1b]0;title\x07", "csi": "\x9b2J", "nul": "a\0b",
    "rtl": "a\u202eb",
    "width": "a\u200bb", "tag": "a\U000e0041b", "quote": "a'b", "double": 'a"b', "space": "a b", "semicolon": "a;b",
    "dollar": "$(id)", "back": "`id`", "option": "-rf", "hidden": ".ssh", "surrogate": "\ud800", "long": "x" * 5000,
    "latin": "é", "line": "a\u2028b", "shy": "a\xadb", "order": "\ufeffa",
}  # fmt: skip


def _source(name: str) -> str:
    [path] = RUNTIME.rglob(name)
    return path.read_text(encoding="utf-8")


class TestNames:
    @pytest.mark.parametrize("name", HOSTILE)
    def test_are_not_plain(self, name: str) -> None:
        assert not names.is_plain(HOSTILE[name])

    @pytest.mark.parametrize("name", ["decode", "layers.0.memory.W0", "_x", "linux-x86_64", "10.3.0+cu12", "x" * 128])
    def test_are_plain(self, name: str) -> None:
        assert names.is_plain(name) and names.is_text(name) and names.shown(name) == name

    def test_what_is_shown_has_no_hidden_characters(self) -> None:
        for text in HOSTILE.values():
            shown = names.shown(text)
            assert names.is_text(shown) or text == "\ud800"
        assert names.shown("a\x1b[2J\n\u202e", keep="\n") == "a\\x1b[2J\n\\u202e"
        assert "\x1b" not in str(UsageError("E0104", "a\x1b", "b\u202e", "c\x9b"))

    def test_are_those_of_the_runtime(self) -> None:
        code = _source("names.h")
        ranges = [(int(a, 16), int(b, 16)) for a, b in re.findall(r"\{+(0x[0-9A-F]+), (0x[0-9A-F]+)\}", code)]
        assert tuple(ranges) == names.HIDDEN
        for name, value in (("Name", 128), ("Key", 512), ("Text", 4096)):
            assert f"kLongest{name} = {value};" in code and getattr(names, f"LONGEST_{name.upper()}") == value

    @pytest.mark.parametrize("kind", HOSTILE)
    def test_no_manifest_has_a_hostile_name(self, kind: str) -> None:
        """Each string of a manifest in turn, and each key of its files, becomes the hostile one."""
        hostile, count = HOSTILE[kind], 0
        fine_as_text = names.is_text(hostile) and len(hostile) <= names.LONGEST_TEXT
        manifest = full()
        for container, key, path in list(places(manifest)):
            before = container[key]
            if not isinstance(before, str) or (fine_as_text and TEXTS.fullmatch(path)):
                continue
            container[key] = hostile
            count += 1
            with pytest.raises(BundleError) as caught:
                parse_manifest(json.dumps(manifest))
            assert names.is_text(str(caught.value)) and "\n" not in str(caught.value)
            container[key] = before
        assert count > 60
        manifest["files"][hostile] = manifest["files"]["decode.onnx"]
        with pytest.raises(BundleError):
            parse_manifest(json.dumps(manifest))


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 2}', '{"a": NaN}', '{"a": Infinity}', '{"a": 1e999}', '{"a": -1e999}', '{"a": -0}', "[-0]",
        '{"a": 18446744073709551616}', '{"a": -9223372036854775809}', '{"a": "\\ud800"}', '{"a": "\\u0000"}',
        '{"a": "\x7f"}', '{"a": "\\u202e"}', '{"\\u001b": 1}', '\ufeff{"a": 1}', '{"a": 1}\0', '{"a": 1} x', "[" * 65,
        "[" * 65 + "]" * 65, '{"a": 1,}', "{'a': 1}", '{"a": 01}', '{"a": .5}', '{"a": 0x1}', '{"a": "\n"}', "",
        '{"' + "k" * 513 + '": 1}', "[" + "1," * (1 << 20) + "1]", '{"a": 1}{"b": 2}', "// c\n1", '{"a": +1}',
    ],
)  # fmt: skip
def test_json_that_readers_could_understand_differently(text: str) -> None:
    with pytest.raises(ValueError):
        strict_json.loads(text)


def test_json_that_all_readers_understand_alike() -> None:
    for text in (
        '{"a": [1, -2, 0.5, 1e3, true, null, "é"]}',
        "[" * 64 + "]" * 64,
        '{"a": 18446744073709551615}',
        "-0.0",
    ):
        assert strict_json.loads(text) == json.loads(text)
    with pytest.raises(ValueError):
        strict_json.loads(b'{"a": "\xff"}')


def test_json_takes_time_in_proportion_to_its_size() -> None:
    def seconds(count: int) -> float:
        text = json.dumps({f"k{i:07}" * 4: i for i in range(count)})
        began = time.process_time()
        strict_json.loads(text)
        return time.process_time() - began

    seconds(1000)
    assert seconds(80_000) < 40 * max(seconds(8_000), 0.01)


def _model(*nodes: onnx.NodeProto, **more: Any) -> onnx.ModelProto:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph(nodes or [helper.make_node("Identity", ["x"], ["y"])], "g", [value], [])
    given: dict[str, Any] = {"opset_imports": [helper.make_opsetid("", 20)], "ir_version": 10, **more}
    return helper.make_model(graph, **given)


class TestOperators:
    def refuse(self, model: onnx.ModelProto, *words: str, compiled: bool = False) -> None:
        with pytest.raises(BundleError) as caught:
            check_operators(model, "a.onnx", compiled)
        assert caught.value.code == "TITANS-E0210"
        for word in words:
            assert word in str(caught.value)

    @pytest.mark.parametrize(
        "domain, name",
        [
            ("com.microsoft", "GroupQueryAttention"), ("com.microsoft", "DecoderMaskedMultiHeadAttention"),
            ("com.microsoft", "CropAndResize"), ("ai.onnx.ml", "LinearRegressor"), ("", "MaxUnpool"), ("", "Unique"),
            ("", "NonMaxSuppression"), ("ai.titans", "Other"), ("evil", "Add"), ("ai.onnx", "Add"), ("", "add"),
        ],
    )  # fmt: skip
    def test_of_others(self, domain: str, name: str) -> None:
        node = helper.make_node(name, ["x"], ["y"], domain=domain)
        for compiled in (False, True):
            self.refuse(_model(node), name, compiled=compiled)
        body = helper.make_graph([node], "b", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])])
        self.refuse(_model(helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)), name)
        deep = helper.make_graph([helper.make_node("If", ["c"], ["y"], then_branch=body)], "d", [], list(body.output))
        self.refuse(_model(helper.make_node("Loop", ["n", "c"], ["y"], body=deep)), name)
        function = helper.make_function(
            "ai.titans", "NeuralMemory", ["x"], ["y"], [node], [helper.make_opsetid("", 20)]
        )
        self.refuse(_model(functions=[function]), name)

    def test_sets_of_others(self) -> None:
        for domain, version in (("", 17), ("", 22), ("ai.titans", 2), ("ai.onnx.ml", 3), ("com.microsoft", 1)):
            self.refuse(_model(opset_imports=[helper.make_opsetid(domain, version)]), "operator set")

    def test_functions_of_others(self) -> None:
        for domain, name in (("", "Add"), ("pkg", "NeuralMemory"), ("ai.titans", "Mine")):
            body = [helper.make_node("Identity", ["x"], ["y"])]
            function = helper.make_function(domain, name, ["x"], ["y"], body, [helper.make_opsetid("", 20)])
            self.refuse(_model(functions=[function]), "function")

    def test_of_engines(self) -> None:
        node = helper.make_node("FusedMatMul", ["x", "x"], ["y"], domain="com.microsoft")
        sets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        check_operators(_model(node, opset_imports=sets), "a.onnx", compiled=True)
        self.refuse(_model(node, opset_imports=sets))

    def test_lists_are_those_of_the_runtime(self) -> None:
        code = _source("graph_check.cpp")

        def listed(name: str) -> set[str]:
            found = re.search(rf"const Names {name}\{{(.*?)\}};", code, re.DOTALL)
            assert found
            return set(re.findall(r'"(\w+)"', found[1]))

        assert listed("kStandard") == allowed.STANDARD
        assert listed("kFused") == allowed.FUSED
        assert listed("kFusedStandard") == allowed.FUSED_STANDARD
        assert listed("kOwn") == set(OPERATORS)
        for name in ("FirstOpset", "LastOpset", "Unversioned"):
            value = getattr(allowed, re.sub(r"(?<!^)(?=[A-Z])", "_", name).upper())
            assert f"k{name} = {value};" in code


class TestEncoding:
    def refuse(self, raw: bytes, *words: str) -> None:
        with pytest.raises(BundleError) as caught:
            parse_model(raw, "a.onnx")
        for word in words:
            assert word in str(caught.value)

    def test_what_this_project_writes(self) -> None:
        model = _model(doc_string="a\nb")
        assert parse_model(model.SerializeToString(), "a.onnx") == model

    def test_tags_of_more_than_32_bits(self) -> None:
        """Protobuf drops the upper bits, so it reads the field that a strict reader does not see."""
        raw = _model().SerializeToString()
        tag = (6 << 3 | 2) | (1 << 34)
        long = bytes(((tag >> shift) & 0x7F) | (0x80 if shift < 35 else 0) for shift in range(0, 36, 7))
        self.refuse(raw + long + b"\x01x")

    def test_fields_twice_out_of_order_or_unknown(self) -> None:
        raw = _model().SerializeToString()
        graph = _model().graph.SerializeToString()
        self.refuse(raw + b"\x3a" + bytes([len(graph)]) + graph)  # merged by parsers, or the last one counts
        self.refuse(raw + b"\x08\x0a")
        self.refuse(raw + b"\xf8\x3f\x01", "unknown")
        self.refuse(b"\x88\x00" + raw[1:])  # a tag in two bytes
        self.refuse(raw[:-1])
        training = _model()
        training.training_info.add()
        self.refuse(training.SerializeToString(), "training_info")

    def test_external_data_in_two_places(self) -> None:
        def model(change: Callable[[TensorProto], object]) -> bytes:
            tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
            for key, value in (("location", "weights.safetensors"), ("offset", "0"), ("length", "4")):
                tensor.external_data.add(key=key, value=value)
            change(tensor)
            made = _model()
            made.graph.initializer.append(tensor)
            return made.SerializeToString()

        parsed = parse_model(model(lambda tensor: None), "a.onnx")
        check_external_data(parsed, "a.onnx", {"weights.safetensors"})
        with pytest.raises(BundleError, match="E0208"):
            check_external_data(parsed, "a.onnx", {"other"})
        changes: list[Callable[[TensorProto], object]] = [
            lambda tensor: tensor.external_data.add(key="location", value="other"),
            lambda tensor: tensor.external_data.add(key="basepath", value="/"),
            lambda tensor: setattr(tensor, "raw_data", b"1234"),
            lambda tensor: tensor.ClearField("data_location"),
            lambda tensor: tensor.ClearField("external_data"),
            lambda tensor: setattr(tensor.external_data[1], "value", "-1"),
            lambda tensor: setattr(tensor.external_data[1], "value", "1e3"),
            lambda tensor: setattr(tensor.external_data[1], "value", "9" * 30),
        ]
        for change in changes:
            self.refuse(model(change))

    def test_tables_are_those_of_the_runtime_and_of_onnx(self) -> None:
        rows = re.findall(
            r"\{Type::k(\w+), (\d+), Kind::k(\w+), (\w+)(?:, Type::k(\w+))?\}", _source("graph_check.cpp")
        )
        rows.append(("Dimension", "2", "Text", "false", ""))
        full = {
            "Model": "ModelProto", "Opset": "OperatorSetIdProto", "Entry": "StringStringEntryProto",
            "Graph": "GraphProto", "Function": "FunctionProto", "Node": "NodeProto", "Attribute": "AttributeProto",
            "Tensor": "TensorProto", "ValueInfo": "ValueInfoProto", "Type": "TypeProto", "TensorType": "Tensor",
            "Shape": "TensorShapeProto", "Dimension": "Dimension",
        }  # fmt: skip
        found: dict[str, set[int]] = {}
        for owner, number, *_ in rows:
            found.setdefault(full[owner], set()).add(int(number))
        assert {name: set(numbers) for name, numbers in FIELDS.items()} == found
        known = _descriptors()
        for owner, number, kind, repeated, message in rows:
            field = known[full[owner]].fields_by_number[int(number)]
            packed = kind.startswith("Packed")
            types = {
                "Text": FieldDescriptor.TYPE_STRING, "Bytes": FieldDescriptor.TYPE_BYTES,
                "Int64": FieldDescriptor.TYPE_INT64, "Int32": FieldDescriptor.TYPE_INT32,
                "Uint64": FieldDescriptor.TYPE_UINT64, "Float": FieldDescriptor.TYPE_FLOAT,
                "Double": FieldDescriptor.TYPE_DOUBLE, "Enum": FieldDescriptor.TYPE_ENUM,
                "Message": FieldDescriptor.TYPE_MESSAGE,
            }  # fmt: skip
            assert field.type == types[kind.removeprefix("Packed")], (owner, number)
            many = field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED
            assert many == (packed or repeated == "true"), (owner, number)
            if message:
                assert field.message_type.name == full[message]

    def test_random_changes_are_refused_or_read_alike(self) -> None:
        """The only encoding that is read is the one that protobuf writes."""
        raw, draw = _model().SerializeToString(), random.Random(5)
        for _ in range(3000):
            changed = bytearray(raw)
            for _ in range(draw.choice((1, 1, 2, 5))):
                at = draw.randrange(len(changed))
                action = draw.randrange(3)
                if action == 0:
                    changed[at] = draw.randrange(256)
                elif action == 1:
                    changed[at:at] = draw.randbytes(draw.randrange(1, 4))
                else:
                    del changed[at]
            try:
                model = parse_model(bytes(changed), "a.onnx")
            except BundleError:
                continue
            assert model.SerializeToString() == bytes(changed)


def _descriptors() -> dict[str, Any]:
    found, waiting = {}, [onnx.ModelProto.DESCRIPTOR]
    while waiting:
        one = waiting.pop()
        if one.name not in found and one.full_name != "onnx.TypeProto.SparseTensor":
            found[one.name] = one
            waiting += [field.message_type for field in one.fields if field.message_type]
    return found


def test_the_hash_of_a_bundle_is_that_of_sha256sum(tmp_path: Path) -> None:
    values = manifest_json()
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    manifest = parse_manifest(json.dumps(values))
    for name in manifest.files:
        (tmp_path / name).write_bytes(name.encode() * 1000)
    command = "LC_ALL=C; export LC_ALL; sha256sum * | sha256sum"
    printed = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    found = trust.bundle_sha256(tmp_path, manifest)
    assert printed.split()[0] == found
    assert trust.Trust(frozenset({found})).check(tmp_path, manifest) == found
    with (tmp_path / next(iter(manifest.files))).open("ab") as file:
        file.write(b"x")
    with pytest.raises(BundleError, match="E0211"):
        trust.Trust(frozenset({found})).check(tmp_path, manifest)
