"""Benchmarks: psie beside what people use instead, in one run, as ratios. Nothing here is a test."""
