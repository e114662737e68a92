"""A cluster of three nodes on this machine, and guests that nothing may hurt."""
