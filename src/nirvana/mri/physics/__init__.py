"""Operators of a Cartesian multi-coil acquisition: Fourier transforms, coils, sampling masks."""
