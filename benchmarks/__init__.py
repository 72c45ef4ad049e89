"""Client overhead of a call, compared with the minimum and with other rerankers: `python -m benchmarks`."""
