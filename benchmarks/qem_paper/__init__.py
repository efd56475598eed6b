"""The experiments of the paper on massively parallel expectation maximisation, [Heap2025]."""
