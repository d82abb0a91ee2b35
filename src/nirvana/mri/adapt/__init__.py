"""A codec that adapts to a scan by predicting measured lines that were held back."""
