"""`ai.titans::CachedAttention`: attention over a stream's cache of keys and values. docs/attention-operator.md."""

from .table import Attribute, Input, Operator

CACHED_ATTENTION = Operator(
    "CachedAttention",
    (
        Input("keys"),
        Input("values"),
        Input("q"),
        Input("k"),
        Input("v"),
        Input("position", "int64"),
        Input("increments", "int64"),  # with rotary
        Input("valid", "int64", optional=True),
        Input("slots", "int64", optional=True),
    ),
    ("y", "keys_out", "values_out"),
    (
        Attribute("heads", label="h"),
        Attribute("window", 0, label="window"),
        Attribute("segment", 0, label="segment"),
        Attribute("persistent", 0, label="f"),
        Attribute("groups", 1, label="g"),
        Attribute("rotary", "none"),
        Attribute("origin", "stream", label="from_"),
    ),
)
