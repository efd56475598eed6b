"""The backends: one module or sub-package for each method that ``infer`` knows by name."""

if __name__ != "ppl.inference":  # a second copy of every class would come of it
    raise ImportError("this folder is imported as ppl.inference: write 'import ppl.inference'")
