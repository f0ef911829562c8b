"""Models of titans-pytorch 0.5 as streams: what its parallel forward computes, token by token, at constant cost."""
