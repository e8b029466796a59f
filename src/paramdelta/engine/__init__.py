"""Carries a plan out, in bounded memory. Decides nothing about what is computed."""
