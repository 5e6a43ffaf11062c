"""Workflows: train, verify, evaluate, diagnose, export and compare runs, one file each."""
