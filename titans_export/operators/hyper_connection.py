"""`ai.titans::HyperConnection`: residual streams mixed around a branch. docs/hyper-connection.md."""

from .table import Attribute, Input, Operator

HYPER_CONNECTION = Operator(
    "HyperConnection",
    (
        Input("residuals"),
        Input("projection"),
        Input("bias"),
        Input("branch", optional=True),
        Input("weight", optional=True),  # with `branch`
    ),
    ("input", "residuals_out", "beta"),
    (Attribute("iterations", 20, label="i"),),
)
