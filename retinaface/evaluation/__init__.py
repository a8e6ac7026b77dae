"""Proving it: average precision, timings, sensitivity, pictures and the report."""
