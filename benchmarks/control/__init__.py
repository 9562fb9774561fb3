"""Runs that show what closed-loop control does, for benchmarks/control_*.py."""
