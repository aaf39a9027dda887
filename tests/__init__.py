"""Tests: one file a module, and those that cross modules."""
