"""How far a result may be from its oracle, by device and dtype. No test has a tolerance of its own for these."""

from __future__ import annotations

TOLERANCES = {
    # Three forms of one recurrence that differ in the order of some hundred sums; relative to the largest value.
    ("cpu", "float64"): 1e-10,
    # Logits, absolute: float32 rounding over 10,000 tokens of a memory that forgets stays below 2e-5 in PyTorch itself,
    # and kernels that sum in another order double it. 1e-4 is what bundles promise.
    ("cpu", "float32"): 1e-4,
    # The kernel against autograd in float64, relative to the largest value. Most memories stay below 1e-6; a LayerNorm
    # over six outputs amplifies rounding to 4e-6.
    ("cpu-kernel", "float32"): 1e-5,
    # Five Newton-Schulz steps multiply by 485 what rounding leaves where the surprise has no direction: PyTorch's own
    # float32 is off by 4.7e-5, the kernel by 5.4e-5.
    ("cpu-kernel-orthogonal", "float32"): 1e-4,
    # As "cpu-kernel", float32 as sums of TF32: what is left out is 2^-22 of a product. Emulated: 2e-6.
    ("cuda-kernel", "float32"): 1e-5,
    # A few roundings of q, k, v, y and of the products' operands, 2^-11 and 2^-8 each; emulated 1.1e-3 and 6.2e-3.
    ("cuda-kernel", "float16"): 2e-3,
    ("cuda-kernel", "bfloat16"): 1e-2,
    # A LayerNorm over six outputs amplifies them as it does those of float32; emulated 5.9e-3 and 3.4e-2.
    ("cuda-kernel-norm", "float16"): 1e-2,
    ("cuda-kernel-norm", "bfloat16"): 5e-2,
    # Logits of engines whose matrix products round their inputs and outputs, relative to the largest: 2^-11 and 2^-8 a
    # rounding, a few dozen in a row. Measured over the variants: 3e-3 and 8e-2.
    ("products", "fp16"): 1e-2,
    ("products", "bf16"): 1.5e-1,
}
