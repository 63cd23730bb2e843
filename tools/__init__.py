"""What the makers of psie run: no part of the package."""
