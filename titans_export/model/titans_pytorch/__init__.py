"""Models of titans-pytorch 0.5 as streams. They compute the library's parallel forward token by token, at constant
cost.
"""
