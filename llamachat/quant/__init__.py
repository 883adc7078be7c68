"""Quantized weights: their one logical form (`tensor.py`)."""
