"""Routing from known scores: ridge regression, nearest neighbours and RouterDC, with cross-validation to name one."""
