"""Fused operations, one folder each."""
