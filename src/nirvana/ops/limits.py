"""What the GPU kernels take; plain numbers, which need neither a kernel nor a GPU to be read."""

HEAD_DIMS = (32, 64, 128)
"""Head sizes K that the kernels of both branches take."""
CONV_WIDTH = 4
"""Width of the convolution that the linear branch's kernels take."""
LEAST_WINDOW = 16
"""Smallest window beside which the kernels take sinks; they read them in blocks within it."""
MAX_SINKS = 16
"""Largest number of sinks that they take."""
MAX_TASK_DIM = 128
"""Largest C of the Trigger's kernels: one matrix of a wider bank exceeds a multiprocessor's shared
memory."""
