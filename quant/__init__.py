"""Quantizers: each a page that reads like its paper. Start with `quant.base` (the contract) and `quant.xnor`.

Importing this package imports nothing heavy; `quant.base.find("xnor")` gives a method by its name.
"""
