"""`ai.titans::CausalConvolution`: a depthwise convolution over tokens. docs/convolution-operator.md."""

from .table import Attribute, Input, Operator

CAUSAL_CONVOLUTION = Operator(
    "CausalConvolution",
    (
        Input("past"),
        Input("x"),
        Input("weight"),
        Input("bias", optional=True),
        Input("valid", "int64", optional=True),
        Input("slots", "int64", optional=True),
    ),
    ("y", "past_out"),
    (Attribute("activation", "none"),),
)
