"""Everything a comparison of two bundles found, as one JSON object, and its verdict in a sentence."""

from __future__ import annotations

import dataclasses
import datetime
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..bundle import MANIFEST, Bundle, file_record
from .metrics import Drift, MemoryDistance, Window
from .recall import Recall

if TYPE_CHECKING:
    import titans_runtime

    from .layers import LayerError

Json = dict[str, Any]


@dataclass(frozen=True)
class Side:
    """One of the two: the bundle and the session it ran in."""

    bundle: Bundle
    session: titans_runtime.Session


@dataclass(frozen=True)
class Report:
    """What was compared, how, and what was found."""

    side: Side
    base: Side
    stream: str  # what was fed, in words
    bytes_per_token: float | None  # of a text
    window: int
    stream_length: int | None
    tolerance: float | None
    bits_tolerance: float | None
    drift: Drift
    base_seconds: float
    layers: list[LayerError] = field(default_factory=list)
    layers_missing: str | None = None  # why there are none
    layer_tokens: int = 0
    recall_task: str | None = None
    recall: list[Recall] = field(default_factory=list)

    def verdict(self) -> str:
        """The sentence that comes first."""
        drift = self.drift
        if not drift.positions:
            return "Nothing was compared: the stream is empty."
        given = [
            text
            for text, value in (
                (f"an error of {self.tolerance:g} of any output" if self.tolerance is not None else "", self.tolerance),
                (
                    f"a window's bits {self.bits_tolerance:g} % larger" if self.bits_tolerance is not None else "",
                    self.bits_tolerance,
                ),
            )
            if value is not None
        ]
        count = f"{drift.positions:,} {'tokens' if self.takes_tokens else 'vectors'}"
        if not given:
            return f"No tolerance was given. Over {count} the {self._sizes()}."
        wanted = " and ".join(given)
        if drift.passed:
            return f"Within tolerance: over {count} the {self._sizes()}. Allowed was {wanted}."
        leaves = f"it leaves at position {drift.first_bad_position:,}"
        return f"Not within tolerance: {leaves}. Over {count} the {self._sizes()}. Allowed was {wanted}."

    @property
    def takes_tokens(self) -> bool:
        """Whether there are bits."""
        return not self.base.bundle.takes_vectors

    def _sizes(self) -> str:
        drift = self.drift
        error = f"largest error of an output is {_number(drift.max_abs_error)}"
        if drift.bits_difference is None:
            return error
        return f"bits are {difference(drift.bits_difference)}, and the {error.replace('an output', 'a logit')}"

    def to_json(self) -> Json:
        """All of it. Numbers that are not finite stay so."""
        from ..bench.machine import describe_machine, describe_packages

        drift, memory_kernel = self.drift, self.side.session.info["memory_kernel"]
        bits = None
        if drift.bits is not None and drift.base_bits is not None and drift.bits_difference is not None:
            bits = {"bundle": drift.bits, "against": drift.base_bits, "difference": drift.bits_difference}
        per_byte = self.bytes_per_token
        return {
            "bundle": str(self.side.bundle.path),
            "against": str(self.base.bundle.path),
            "memory_kernel": memory_kernel,
            "passed": drift.passed,
            "max_abs_error": drift.max_abs_error,
            "first_bad_position": drift.first_bad_position,
            "positions": drift.positions,
            "tolerance": self.tolerance,
            "bits_tolerance": self.bits_tolerance,
            "verdict": self.verdict(),
            "first_beyond_tolerance": drift.first_beyond_tolerance,
            "first_window_beyond": drift.first_window_beyond,
            "mean_abs_error": drift.mean_abs_error,
            "bits_per_token": bits,
            "bits_per_byte": bits
            and per_byte
            and {key: value if key == "difference" else value / per_byte for key, value in bits.items()},
            "kl_bits": None if drift.kl_mean is None else {"mean": drift.kl_mean, "max": drift.kl_max},
            "top1_agreement": drift.agreement,
            "stream": self.stream,
            "stream_length": self.stream_length,
            "window": self.window,
            "windows": [_window(window) for window in drift.windows],
            "memory": [_memory(distance) for distance in drift.memory],
            "layers": None
            if self.layers_missing
            else {"tokens": self.layer_tokens, "errors": [dataclasses.asdict(error) for error in self.layers]},
            "layers_missing": self.layers_missing,
            "recall": None
            if self.recall_task is None
            else {"task": self.recall_task, "distances": [_recall(recall) for recall in self.recall]},
            "seconds": {"bundle": drift.seconds, "against": self.base_seconds},
            "bundles": {"bundle": provenance(self.side), "against": provenance(self.base)},
            "machine": describe_machine(),
            "packages": describe_packages(),
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        }


def provenance(side: Side) -> Json:
    """Where the numbers come from: the bundle, by the hash of its manifest, which holds those of all files."""
    manifest, info = side.bundle.manifest, side.session.info
    weights, quantization = manifest.files[manifest.weights.file], manifest.quantization
    return {
        "name": side.bundle.path.name,
        "model": manifest.model.name,
        "manifest_xxh3_128": file_record(side.bundle.path / MANIFEST).xxh3_128,
        "weights_xxh3_128": weights.xxh3_128,
        "weights_bytes": weights.bytes,
        "checkpoint_sha256": manifest.model.weights_sha256,
        "producer": manifest.producer,
        "recipe": quantization.recipe.get("name") if quantization else None,
        "memory": quantization.memory.to_json() if quantization else None,
        "device": info["device"],
        "backend": f"{info['backend']} {info.get('backend_version') or ''}".strip(),
        "engine": info.get("engine"),
        "memory_kernel": info["memory_kernel"],
    }


def difference(part: float) -> str:
    """By how much bits are larger, in words."""
    if not math.isfinite(part):
        return "no number"
    if part == 0:
        return "the same"
    return f"{abs(part):.2%} {'larger' if part > 0 else 'smaller'}" if abs(part) >= 5e-5 else "the same but for 0.005 %"


def _number(value: float) -> str:
    return f"{value:.2g}" if math.isfinite(value) else "infinite"


def _window(window: Window) -> Json:
    values = dataclasses.asdict(window)
    return {
        "start": values.pop("start"),
        "end": values.pop("end"),
        "bits": values.pop("bits"),
        "base_bits": values.pop("base_bits"),
        "bits_difference": window.bits_difference,
        **values,
    }


def _memory(distance: MemoryDistance) -> Json:
    return dataclasses.asdict(distance)


def _recall(recall: Recall) -> Json:
    return {"distance": recall.distance, "trials": recall.trials, "bundle": recall.value, "against": recall.base}
