"""The result of a comparison of two bundles: a JSON object and a verdict in one sentence."""

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
    """A bundle and the session it ran in."""

    bundle: Bundle
    session: titans_runtime.Session


@dataclass(frozen=True)
class Report:
    """The inputs, options and results of a comparison."""

    side: Side
    reference: Side
    stream: str  # description of the input
    bytes_per_token: float | None  # of a text
    window: int
    stream_length: int | None
    tolerance: float | None
    bits_tolerance: float | None
    drift: Drift
    reference_seconds: float
    layers: list[LayerError] = field(default_factory=list)
    layers_missing: str | None = None  # the reason
    layer_tokens: int = 0
    recall_task: str | None = None
    recall: list[Recall] = field(default_factory=list)

    def verdict(self) -> str:
        """The result in one sentence."""
        drift = self.drift
        if not drift.positions:
            return "Nothing was compared: the stream is empty."
        given = [
            text
            for text, value in (
                (f"an output error of {self.tolerance:g}" if self.tolerance is not None else "", self.tolerance),
                (
                    f"{self.bits_tolerance:g} % more bits in a window" if self.bits_tolerance is not None else "",
                    self.bits_tolerance,
                ),
            )
            if value is not None
        ]
        count = f"{drift.positions:,} {'tokens' if self.takes_tokens else 'vectors'}"
        if not given:
            return f"No tolerance was given. Over {count}, the {self._sizes()}."
        wanted = " and ".join(given)
        if drift.passed:
            return f"Within tolerance: over {count}, the {self._sizes()}. Allowed: {wanted}."
        first = f"first exceeded at position {drift.first_bad_position:,}"
        return f"Not within tolerance: {first}. Over {count}, the {self._sizes()}. Allowed: {wanted}."

    @property
    def takes_tokens(self) -> bool:
        """Whether the bundles take tokens, so that there are bits."""
        return not self.reference.bundle.takes_vectors

    def _sizes(self) -> str:
        drift = self.drift
        error = f"maximum error of an output is {_number(drift.max_abs_error)}"
        if drift.bits_difference is None:
            return error
        return f"bits are {difference(drift.bits_difference)}, and the {error.replace('an output', 'a logit')}"

    def to_json(self) -> Json:
        """The JSON object. It may hold NaN and infinity."""
        from ..bench.machine import describe_machine, describe_packages

        drift, memory_kernel = self.drift, self.side.session.info["memory_kernel"]
        bits = None
        if drift.bits is not None and drift.reference_bits is not None and drift.bits_difference is not None:
            bits = {"bundle": drift.bits, "reference": drift.reference_bits, "difference": drift.bits_difference}
        per_byte = self.bytes_per_token
        return {
            "bundle": str(self.side.bundle.path),
            "reference": str(self.reference.bundle.path),
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
            "top1_agreement": drift.top1_agreement,
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
            "seconds": {"bundle": drift.seconds, "reference": self.reference_seconds},
            "bundles": {"bundle": provenance(self.side), "reference": provenance(self.reference)},
            "machine": describe_machine(),
            "packages": describe_packages(),
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        }


def provenance(side: Side) -> Json:
    """The bundle, by the hash of its manifest with the hashes of all files, and where it ran."""
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
    """The relative difference of bits in words."""
    if not math.isfinite(part):
        return "not finite"
    if part == 0:
        return "the same"
    return f"{abs(part):.2%} {'larger' if part > 0 else 'smaller'}" if abs(part) >= 5e-5 else "the same within 0.005 %"


def _number(value: float) -> str:
    return f"{value:.2g}" if math.isfinite(value) else "infinite"


def _window(window: Window) -> Json:
    values = dataclasses.asdict(window)
    return {
        "start": values.pop("start"),
        "end": values.pop("end"),
        "bits": values.pop("bits"),
        "reference_bits": values.pop("reference_bits"),
        "bits_difference": window.bits_difference,
        **values,
    }


def _memory(distance: MemoryDistance) -> Json:
    return dataclasses.asdict(distance)


def _recall(recall: Recall) -> Json:
    return {"distance": recall.distance, "trials": recall.trials, "bundle": recall.value, "reference": recall.reference}
