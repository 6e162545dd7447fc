"""Benchmarks: named shapes, timing, machine ceilings, peers, and the suites that print ratios to them."""
