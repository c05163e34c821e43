"""What nobody needs to read to understand the method. Each runs from the root: python -m tools.NAME."""
