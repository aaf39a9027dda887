"""Devices, processes and the disk."""
