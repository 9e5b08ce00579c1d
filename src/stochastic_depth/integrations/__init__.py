"""Adapters to training libraries. Each loads its library, and only where it is imported itself."""
