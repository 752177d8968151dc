"""The commands of ``dit-sparse``; ``cli.py`` puts them together."""
