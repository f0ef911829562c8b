"""The names of checkpoint formats. Reading them needs no PyTorch; the readers are in `checkpoints`."""

FORMATS = ("titans", "titans-pytorch", "titans-pytorch-mlx")
