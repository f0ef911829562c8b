"""Converts PyTorch models to ONNX graphs with the memory as one operator."""
