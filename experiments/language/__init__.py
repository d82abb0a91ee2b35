"""The language study: Nirvana, its peers and its variants at one size and budget."""
