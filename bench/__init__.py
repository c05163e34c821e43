"""How fast this is, measured beside other programs on the machine at hand: `python -m bench`."""
