"""The report study: clinical reports of simulated lesions by the frozen language model."""
