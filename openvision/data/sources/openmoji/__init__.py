"""OpenMoji: about 3,800 drawings from one pip package, with names, alt-texts and captions."""
