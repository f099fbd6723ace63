"""Slower proofs, one command each: python -m tests.programs.NAME, from the project's folder."""
