"""Models of Aedelon's titans-pytorch-mlx (its PyTorch side) as streams: docs/titans-pytorch-mlx.md."""
