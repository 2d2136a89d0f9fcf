"""Whole experiments on real data: what the command line runs."""
