"""Measured speed and memory, with the dense code that it is compared to."""
