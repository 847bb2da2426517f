"""Drawn scenes that stand for data sets where none is at hand."""
