"""What a session counts, as a dataclass and as Prometheus reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

import titans_runtime as rt

parser = pytest.importorskip("prometheus_client.parser", reason="prometheus-client is not installed")


@pytest.fixture
def own_session(bundle: Path) -> rt.Session:
    return rt.Session(bundle, threads=1)


def test_counts(own_session: rt.Session) -> None:
    one, other = own_session.stream(), own_session.stream()
    one.feed(range(10))
    other.feed([1], "none")
    for token in range(5):
        other.step(token)
    one.score([1, 2, 3])
    list(one.generate(max_tokens=4))
    with pytest.raises(rt.Error):
        one.feed([99])
    metrics = own_session.metrics()
    assert (metrics.streams, metrics.tokens, metrics.calls) == (2, 10 + 1 + 5 + 3 + 4, 1 + 1 + 5 + 1 + 4)
    assert (metrics.failed, metrics.cancelled, metrics.rollbacks, metrics.spilled, metrics.restored) == (0, 0, 0, 0, 0)
    assert metrics.chunk_updates == metrics.tokens  # nothing says where this memory's chunks end
    assert metrics.state_bytes == metrics.resident_bytes == one.state_bytes + other.state_bytes
    assert (metrics.step.count, metrics.feed.count) == (1 + 5 + 4, 2)
    for durations in (metrics.step, metrics.feed):
        assert 0 < durations.p50_seconds <= durations.p90_seconds <= durations.p99_seconds <= durations.max_seconds
        assert durations.max_seconds <= durations.sum_seconds
    other.close()
    assert own_session.metrics().streams == 1


def test_prometheus_reads_the_text(own_session: rt.Session, bundle: Path) -> None:
    stream = own_session.stream()
    stream.feed(range(10))
    for token in range(7):
        stream.step(token)
    metrics = own_session.metrics()
    families = {family.name: family for family in parser.text_string_to_metric_families(own_session.metrics_text())}
    samples = {}
    for family in families.values():
        assert family.documentation and family.samples
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("bundle") == bundle.name
            samples[(sample.name, *sorted(labels.items()))] = sample.value
    assert families["titans_streams"].type == families["titans_resident_bytes"].type == "gauge"
    assert families["titans_tokens"].type == "counter"
    assert families["titans_call_seconds"].type == "histogram"
    numbers = ("streams", "state_bytes", "resident_bytes")
    totals = ("tokens", "chunk_updates", "rollbacks", "spilled", "restored")
    for name in numbers:
        assert samples[(f"titans_{name}",)] == getattr(metrics, name)
    for name in totals:
        assert samples[(f"titans_{name}_total",)] == getattr(metrics, name)
    assert samples[("titans_calls_failed_total",)] == samples[("titans_calls_cancelled_total",)] == 0
    for kind, durations in (("step", metrics.step), ("feed", metrics.feed)):
        label = ("kind", kind)
        assert samples["titans_call_seconds_count", label] == durations.count
        assert samples["titans_call_seconds_sum", label] == pytest.approx(durations.sum_seconds)
        bounds = sorted(
            (float(dict(key[1:])["le"]), value)
            for key, value in samples.items()
            if key[0] == "titans_call_seconds_bucket" and label in key
        )
        counts = [value for _, value in bounds]
        assert len(bounds) == 15 and bounds[-1] == (float("inf"), durations.count) and counts == sorted(counts)
        # What the buckets say and what was measured.
        below = [count for bound, count in bounds if bound < durations.max_seconds]
        assert all(count < durations.count for count in below[:-1])
        assert [count for bound, count in bounds if bound > durations.max_seconds] == [durations.count] * (
            len(bounds) - len(below)
        )


def test_a_closed_session_has_none(own_session: rt.Session) -> None:
    own_session.close()
    for read in (own_session.metrics, own_session.metrics_text):
        with pytest.raises(rt.Error, match="closed"):
            read()
