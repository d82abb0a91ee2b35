"""The anatomy of brain slices: lobes, simulated lesions, random changes."""
