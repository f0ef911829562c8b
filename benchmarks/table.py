"""Generates the tables of docs/benchmarks.md and docs/quantization.md from the newest result files.

python -m benchmarks.table            writes them between the pages' markers
python -m benchmarks.table --check    exit code 1 if a page differs
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.report import RESULTS, ROOT

DOCUMENT = ROOT / "docs" / "benchmarks.md"
QUANTIZATION = ROOT / "docs" / "quantization.md"
MARKERS = "<!-- results: {} -->", "<!-- end of results -->"
PICTURE = "![Speed-up over each baseline, and share of the machine's limits](benchmarks.svg)"
SPEED = ("tokens/s", "rounds", "p50 us", "p90 us", "p99 us")
Result = dict[str, Any]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def layer_ratios(result: Result) -> str:
    """The speed-up of the first implementation over each baseline, and its share of the limit, per row."""
    others = list(dict.fromkeys(other for row in result["rows"] for other in row["ratios"]))
    lines = []
    for row in result["rows"]:
        first = next((entry for entry in row["baselines"] if "speed" in entry), None)
        if first is None:
            continue
        share = f"{first['share_of_limit']:.0%} of {row['bound_by']}"
        lines.append([row["name"], *(_ratio(row["ratios"].get(other)) for other in others), share])
    return markdown(["row", *(f"{_first(result)} / {other}" for other in others), "share of the limit"], lines)


def layer_speeds(result: Result) -> str:
    """Every implementation of every row."""
    header = ["row", "implementation", *SPEED, "of limit", "error", "state", "RSS growth"]
    lines = []
    for row in result["rows"]:
        for entry in row["baselines"]:
            label = [row["name"], entry["name"]]
            if "speed" in entry:
                checked = _error(max(entry["errors"].values())) if entry["errors"] else "different update"
                share = f"{entry['share_of_limit']:.0%}" if entry["same_mathematics"] else "-"
                memory = (_size(entry["state_bytes"]), _size(entry["rss_growth_bytes"]))
                lines.append([*label, *_speed(entry["speed"]), share, checked, *memory])
            elif entry["passed"] is False:
                lines.append([*label, "**incorrect**", *["-"] * 5, _error(_largest(entry["errors"])), "-", "-"])
    return markdown(header, lines)


def layer_absent(result: Result) -> str:
    """The implementations that could not run, with reasons."""
    found = [
        f"- {row['name']}, {entry['name']}: {_reason(entry['unavailable'])}"
        for row in result["rows"]
        for entry in row["baselines"]
        if entry["unavailable"]
    ]
    return "\n".join(found)


def layer_forms(result: Result) -> str:
    """The speeds of all forms of torch.compile tried in each row; the fastest is kept."""
    lines = []
    for row in result["rows"]:
        notes: dict[str, Any] = next(
            (entry.get("notes", {}) for entry in row["baselines"] if entry["name"] == "torch-compile"), {}
        )
        for form, rate in notes.get("tokens_per_second_tried", {}).items():
            lines.append([row["name"], form, f"{rate:,.0f}", "kept" if form == notes["form"] else ""])
    return markdown(["row", "form", "tokens/s in the trial", ""], lines)


def limits(result: Result) -> str:
    """The machine's limits."""
    limit = result["limits"]
    products = ", ".join(f"{name} {rate:,.0f}" for name, rate in limit["sgemm_gflops_by_library"].items())
    lines = [["large sgemm, GFLOP/s", f"{limit['sgemm_gflops']:,.0f}", products]]
    lines += [
        [f"matmul {shape}, GFLOP/s", f"{rate:,.0f}", f"{rate / limit['sgemm_gflops']:.0%} of the large one"]
        for shape, rate in limit["batched_gflops"].items()
    ]
    lines += [
        [f"{_size(int(size))}, read, GB/s", f"{rate['read']:,.1f}", f"copy {rate['copy']:,.1f}"]
        for size, rate in sorted(limit["bandwidth_gb_s"].items(), key=lambda item: int(item[0]))
    ]
    return markdown(["limit", "value", ""], lines)


def model_ratios(results: list[Result]) -> str:
    """The speed-up of our kernel over each baseline, per model and kind."""
    others = list(dict.fromkeys(other for r in results for ratios in r["ratios"].values() for other in ratios))
    lines = [
        [result["name"], kind, *(_ratio(ratios.get(other)) for other in others)]
        for result in results
        for kind, ratios in result["ratios"].items()
    ]
    return markdown(["model", "", *(f"memory-kernel / {other}" for other in others)], lines)


def model_speeds(results: list[Result]) -> str:
    """Every implementation, per model and kind."""
    header = ["model", "", "implementation", *SPEED, "error", "state", "peak RSS"]
    lines = [
        [
            result["name"],
            kind,
            entry["name"],
            *_speed(entry[kind]),
            _error(entry["max_abs_error"]),
            _size(entry["state_bytes"]),
            _size(entry["peak_rss_bytes"]),
        ]
        for result in results
        for kind in result["ratios"]
        for entry in result["baselines"]
        if entry[kind]
    ]
    return markdown(header, lines)


def library_ratios(result: Result) -> str:
    """The speed-up of the runtime over each baseline for a titans-pytorch model."""
    others = list(dict.fromkeys(other for ratios in result["ratios"].values() for other in ratios))
    lines = [
        [result["name"], kind, *(_ratio(ratios.get(other)) for other in others)]
        for kind, ratios in result["ratios"].items()
    ]
    return markdown(["model", "", *(f"runtime / {other}" for other in others)], lines)


def library_speeds(result: Result) -> str:
    """Every implementation of a titans-pytorch model."""
    header = ["", "implementation", *SPEED, "of limit", "error", "state", "peak RSS"]
    lines = [
        [
            kind,
            entry["name"],
            *_speed(entry[kind]),
            f"{entry['share_of_limit'][kind]:.0%}" if kind in entry["share_of_limit"] else "-",
            _error(entry["max_abs_error"]),
            _size(entry["state_bytes"]),
            _size(entry["peak_rss_bytes"]),
        ]
        for kind in result["ratios"]
        for entry in result["baselines"]
        if entry[kind]
    ]
    return markdown(header, lines)


def library_notes(result: Result) -> str:
    """Limits, notes of each implementation, and implementations that could not run."""
    limit, size = result["limits"], result["weight_bytes_per_token"]
    bandwidth = limit["bandwidth_gb_s"][str(size)]["read"]
    lines = [
        f"- {result['prompt_tokens']:,} tokens of prefill, then {result['decode_tokens']:,} decoded from position "
        f"{result['prompt_tokens']:,} on; {result['parameters']:,} parameters; a decoded token reads {_size(size)} of "
        f"weights, which this machine reads at {bandwidth:,.1f} GB/s; large sgemm {limit['sgemm_gflops']:,.0f} GFLOP/s"
    ]
    if result["flop_per_token"]:
        lines[0] += f", a token of prefill takes {result['flop_per_token'] / 1e6:,.0f} MFLOP"
    for entry in result["baselines"]:
        notes = [f"{name.replace('_', ' ')} {_note(value)}" for name, value in entry["notes"].items()]
        text = _reason(entry["unavailable"]) if entry["unavailable"] else "; ".join(notes)
        lines += [f"- {entry['name']}: {text}"] if text else []
    return "\n".join(lines)


def library_profile(result: Result) -> str:
    """The runtime's time in a titans-pytorch model, by group and by operator."""
    kinds = result["profile"]
    lines = [
        [kind, f"{found['tokens']:,}", f"{found['nodes']:,.0f}", *_of(found, list(found["groups_us"].values()))]
        for kind, found in kinds.items()
    ]
    groups = list(next(iter(kinds.values()))["groups_us"])
    sums = markdown(["", "tokens", "nodes", "microseconds", *groups], lines)
    each = [
        [kind, entry["operator"], entry["group"], f"{entry['nodes']:,.1f}", f"{entry['us']:,.1f}",
         f"{entry['us'] / found['us']:.0%}"]
        for kind, found in kinds.items()
        for entry in found["operators"]
    ]  # fmt: skip
    return sums + "\n\n" + markdown(["", "operator", "group", "nodes", "microseconds", "of all"], each)


def _of(found: Result, values: list[float]) -> list[str]:
    total = found["us"]
    return [f"{total:,.0f}", *(f"{value:,.0f} ({value / total:.0%})" for value in values)]


def _note(value: Any) -> str:
    return f"{value:.1e}" if isinstance(value, float) else str(value)


def long_stream(results: list[Result]) -> str:
    """The long streams, one row each."""
    memory = ("resident at 10,000", "at the end", "grown by")
    header = ["model", "fed", "tokens", *memory, "speed, last / first", "tokens/s", "bits/byte"]
    lines = [
        [
            result["name"].partition(",")[0],
            result["fed"],
            f"{result['tokens']:,}",
            _size(result["rss_bytes_at_start"]),
            _size(result["rss_bytes_at_end"]),
            _size(result["rss_growth_bytes"]),
            f"{result['speed_ratio']:.3f}",
            f"{result['tokens_per_second']:,.0f}",
            f"{result['bits_per_byte']:.3f}",
        ]
        for result in results
    ]
    return markdown(header, lines)


def many_streams(results: list[Result]) -> str:
    """Tokens per second of every implementation by kind of call and number of streams."""
    names = list(dict.fromkeys(name for result in results for row in result["rows"] for name in row["baselines"]))
    lines = []
    for result in results:
        for row in result["rows"]:
            rates = (row["baselines"].get(name, {}).get("tokens_per_second") for name in names)
            label = [result["name"], f"{row['kind']} of {row['streams']}"]
            lines.append([*label, *("-" if rate is None else f"{rate:,.0f}" for rate in rates)])
    header = ["model", "call", *("runtime, fast batches" if name == "runtime" else name for name in names)]
    return markdown(header, lines)


def sizes(result: Result) -> str:
    """Every step of each size, and the growth law."""
    header = ["model", "weights", "step", "seconds", "processor seconds", "peak memory", "reach", "load before"]
    lines = []
    for name, size in result["sizes"].items():
        for step, found in size["steps"].items():
            reach = result["reach"].get(step)
            most = reach and reach[0] * found["weights_bytes"] + reach[1]
            lines.append(
                [name, _gigabytes(found["weights_bytes"]), step, f"{found['seconds']:,.0f}",
                 f"{found['processor_seconds']:,.0f}", _gigabytes(found["peak_bytes"]),
                 _gigabytes(most) if most else "-", f"{found['load_before']:.1f}"]
            )  # fmt: skip
    law = [
        [step, f"{line['sizes']}",
         f"{line['peak_bytes_per_byte']:.2f} x weights + {_gigabytes(line['peak_bytes_at_zero'])}",
         f"{line['processor_seconds_per_gb']:,.0f} x GB of weights + {line['processor_seconds_at_zero']:,.0f}"]
        for step, line in result["law"].items()
    ]  # fmt: skip
    return "\n\n".join(
        (
            f"{where({'threads': result['machine']['cores'], **result})} Niceness {result['niceness']}.",
            markdown(header, lines),
            "The growth law over these sizes, in bytes of the float32 weights:",
            markdown(["step", "sizes", "peak memory", "processor seconds"], law),
        )
    )


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:,.2f} GB"


def quantization(result: Result) -> str:
    """One table per model: cost and gain of each recipe against float32, then the recipes that could not run."""
    return "\n\n".join(text for model in result["models"] for text in _quantized_model(model) if text)


def _quantized_model(model: Result) -> Iterable[str]:
    base, *_ = model["recipes"]
    present = [entry for entry in model["recipes"] if entry["unavailable"] is None]
    fresh = f", a fresh stream every {model['stream_length']:,}" if model["stream_length"] else ""
    read = f"{model['tokens']:,} tokens of {model['text']}{fresh}" if model["tokens"] else "random weights, timed alone"
    yield f"**{model['name']}**: {read}. {where(model)}"
    recalls = [entry["distance"] for entry in base.get("recall", {}).get("distances", [])][-1:]
    pairs = base.get("recall", {}).get("task") == "pairs"
    drift = ["bits per token", "increase", "worst window", "KL", "top-1 agreement", "distance of W", "of S"]
    header = ["recipe", "weights", "state", "prefill", "decode"]
    # Most tokens of the recall task are random, so bits are meaningless.
    first = 3 if pairs else 0
    header += [*(drift[first:] if model["tokens"] else []), *(f"recall over {distance:,}" for distance in recalls)]
    lines = []
    for entry in present:
        line = [entry["name"], *(_size(entry[key]) for key in ("weights_bytes", "state_bytes"))]
        line += [_times(entry.get(kind), base.get(kind)) for kind in ("prefill", "decode")]
        if model["tokens"]:
            line += _drift(entry)[first:]
        for distance in recalls:
            found = {row["distance"]: row["value"] for row in entry["recall"]["distances"]}
            line.append(f"{found[distance]:.1%}" if pairs else f"{found[distance]:.2f} bits")
        lines.append(line)
    yield markdown(header, lines)
    yield "\n".join(
        f"- {e['name']}: {_reason(e['unavailable'])}" for e in model["recipes"] if e["unavailable"] is not None
    )


def _times(speed: dict[str, float] | None, base: dict[str, float] | None) -> str:
    """Tokens per second, and the speed-up over float32."""
    if speed is None or base is None:
        return "-"
    return f"{speed['tokens_per_second']:,.0f} ({speed['tokens_per_second'] / base['tokens_per_second']:.2f})"


def _drift(entry: Result) -> list[str]:
    """The columns of a stream's drift; float32 has only the bits."""
    if "bits_difference" not in entry:
        return [f"{entry['bits_per_token']:.4f}", *["-"] * 6]
    parts = [f"{entry[key]:+.2%}" if entry[key] is not None else "-" for key in ("bits_difference", "worst_window")]
    memory = [_error(entry["memory"][key]) for key in ("weights", "surprise")]
    bits = "-" if entry["bits_per_token"] is None else f"{entry['bits_per_token']:.4f}"
    return [bits, *parts, _error(entry["kl_mean"]), f"{entry['top1_agreement']:.2%}", *memory]


def where(result: Result) -> str:
    """Machine and versions of a result."""
    machine, packages = result["machine"], result["packages"]
    versions = ", ".join(f"{name} {version}" for name, version in packages.items())
    changes = " with uncommitted changes" if result["uncommitted_changes"] else ""
    caches = ", ".join(f"{level} {size}" for level, size in machine["caches"].items())
    return (
        f"{result['date']}, commit {(result['commit'] or 'unknown')[:10]}{changes}, {result['threads']} threads on "
        f"{machine['cores']} cores of {machine['processor']} ({machine['architecture']}, "
        f"{', '.join(machine['flags'])}; caches per core: {caches}), {_size(machine['memory_bytes'])} of memory, "
        f"{machine['system']}, Python {machine['python']}; {versions}. "
        f"Other programs used {result['others_busy']:.0%} of the machine."
    )


def blocks(folder: Path = RESULTS) -> dict[str, str]:
    """The text between the markers, by the name in the opening marker."""
    layers, models, streams, library, measured, batches = (
        newest(folder, name) for name in ("layer", "model", "long-stream", "titans-pytorch", "sizes", "streams")
    )
    found: dict[str, tuple[list[Result], Callable[[], str]]] = {
        "layer": (
            layers,
            lambda: "\n\n".join(
                text
                for text in (
                    where(layers[0]),
                    layer_ratios(layers[0]),
                    PICTURE,
                    layer_speeds(layers[0]),
                    layer_absent(layers[0]),
                )
                if text
            ),
        ),
        "forms": (layers, lambda: layer_forms(layers[0])),
        "limits": (layers, lambda: limits(layers[0])),
        "models": (models, lambda: "\n\n".join((where(models[0]), model_ratios(models), model_speeds(models)))),
        "titans-pytorch": (
            library,
            lambda: "\n\n".join(
                make(library[0]) for make in (where, library_ratios, library_speeds, library_notes, library_profile)
            ),
        ),
        "long-stream": (streams, lambda: "\n\n".join((*dict.fromkeys(map(where, streams)), long_stream(streams)))),
        "streams": (batches, lambda: "\n\n".join((*dict.fromkeys(map(where, batches)), many_streams(batches)))),
        "sizes": (measured, lambda: sizes(measured[0])),
    }
    return {name: make() if results else "Not measured yet." for name, (results, make) in found.items()}


def quantization_blocks(folder: Path = RESULTS) -> dict[str, str]:
    """The text between the markers of docs/quantization.md."""
    found = newest(folder, "quantization")
    return {"quantization": quantization(found[0]) if found else "Not measured yet."}


def newest(folder: Path, benchmark: str) -> list[Result]:
    """The newest result of each subject of a benchmark."""
    found: dict[str, Result] = {}
    for path in sorted(folder.glob("*.json")):
        result: Result = json.loads(path.read_text(encoding="utf-8"))
        if result.get("benchmark") == benchmark:
            subject = result.get("name", benchmark)
            if subject not in found or found[subject]["date"] <= result["date"]:
                found[subject] = result
    return list(found.values())


def fill(text: str, contents: dict[str, str], page: Path = DOCUMENT) -> str:
    """The page with every block inserted. Raises ValueError if the page lacks a block's markers."""
    for name, block in contents.items():
        first, last = MARKERS[0].format(name), MARKERS[1]
        before, found, rest = text.partition(first)
        _, ended, after = rest.partition(last)
        if not found or not ended:
            raise ValueError(f"{page.name} lacks the markers {first} and {last}")
        text = f"{before}{first}\n\n{block}\n\n{last}{after}"
    return text


def _first(result: Result) -> str:
    """The implementation that baselines are compared with."""
    names = (entry["name"] for row in result["rows"] for entry in row["baselines"] if "speed" in entry)
    return next(names, "-")


def _speed(speed: dict[str, float]) -> list[str]:
    return [
        f"{speed['tokens_per_second']:,.0f}",
        f"{speed['slowest_round']:,.0f} to {speed['fastest_round']:,.0f}",
        *(f"{speed[name]:,.1f}" for name in ("p50_us", "p90_us", "p99_us")),
    ]


def _reason(message: str) -> str:
    """The reason in an error message. Older result files have the form "[where] expected X but got Y; fix"."""
    old = re.fullmatch(r"\[[^]]*\] expected (?P<needed>.+?) but got (?P<found>.+?); .*", message)
    return f"needs {old['needed']}, found {old['found']}" if old else message


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}"


def _largest(values: dict[str, float | None]) -> float | None:
    """The largest value; None if one is not finite."""
    known = [value for value in values.values() if value is not None]
    return max(known) if len(known) == len(values) else None


def _size(count: int | None) -> str:
    if count is None:
        return "-"
    if abs(count) < 1024 * 1024:
        return f"{count / 1024:,.1f} KiB"
    return f"{count / 1024 / 1024:,.1f} MiB"


@click.command(help=__doc__)
@click.option("--check", is_flag=True, help="Compare without writing.")
def main(check: bool) -> None:
    for page, contents in ((DOCUMENT, blocks()), (QUANTIZATION, quantization_blocks())):
        text = page.read_text(encoding="utf-8")
        filled = fill(text, contents, page)
        if check and filled != text:
            sys.exit(f"[{page.name}] the tables differ from the result files. Fix: run python -m benchmarks.table")
        page.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    main()
