"""The models of posteriordb in this language; ``benchmarks/posteriordb.py`` fits them."""
