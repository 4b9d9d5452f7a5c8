"""Calibration: which faces, and what ranges their activations have."""
