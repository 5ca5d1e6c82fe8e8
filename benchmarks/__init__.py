"""Measurements: each compares with a peer and with the floor in the same run."""
