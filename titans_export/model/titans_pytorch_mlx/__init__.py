"""Models of Aedelon's titans-pytorch-mlx (its PyTorch part) as streams: docs/titans-pytorch-mlx.md."""
