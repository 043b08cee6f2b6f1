"""Figures behind the claims in the docs; one module a claim, run by `make bench`. Nothing here is a test."""
