"""The study of adaptation: a frozen model that learns from the sample that it reads."""
