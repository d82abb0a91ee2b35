"""The simulated acquisition of magnitude images: phase, coils, noise and sampling of k-space."""
