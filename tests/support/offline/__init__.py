"""Whole offline pipelines, one file for each family."""
