"""Certification of row invariance: is a row of a canonical pass really a function of its own prefix alone?"""
