"""What the tests share: the programs with state of their own, and images."""
