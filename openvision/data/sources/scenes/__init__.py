"""`scenes`: composed images with texts like the web's, where an alt-text says little and a caption tells all.

Groups of OpenMoji glyphs on coloured and textured backgrounds with printed words; every scene carries its description
and an exact mask. `objects` is the vocabulary, `scene` samples a description, `render` paints it, `texts` words it,
`make` writes the splits.
"""
