"""What a call costs, beside the least that it could cost and beside other rerankers: `python -m benchmarks`."""
