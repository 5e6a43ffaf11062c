"""What certtrain uses of scipy, which ships no annotations."""
