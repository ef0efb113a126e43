"""OpenMoji: about 3,800 emoji from one pip package. Glyphs, names, measured attributes, captions, and the split.

Other sources that draw emoji import from here.
"""
