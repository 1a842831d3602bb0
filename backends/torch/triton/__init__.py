"""RBN for PyTorch tensors on CUDA devices: the passes of the two-pass form as Triton kernels.

Forward is two launches, and so is backward: one reduces every plane, one transforms it, and its programs
compute what they need of their channels by themselves, from the (N, C) numbers that the first one left. Where
a channel has many such numbers, a small launch between the two does so once. Names are those of
`rbn_core.two_pass`.

A program takes a tile: IMAGES x CHANNELS planes, BLOCK positions at a time. Both memory formats take the same
kernels, and only strides differ. No sum depends on the order in which programs run: results are reproducible.
"""
