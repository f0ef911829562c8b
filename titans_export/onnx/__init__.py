"""From a PyTorch model to ONNX graphs with the memory as one operator."""
