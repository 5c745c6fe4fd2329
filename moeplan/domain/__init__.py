"""Nouns: frozen values without input or output. See each file for one noun."""
