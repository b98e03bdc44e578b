"""Builds emoji-1594: 1,594 concepts drawn by seven vendors, with names and keywords from Unicode CLDR."""
