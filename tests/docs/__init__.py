"""Tests of the documentation and of the code in it."""
