"""Networks that are trained elsewhere and stay frozen here: autoencoders of images, networks that compare images.

A model calls them, and none of their parameters is a parameter of the model. May import nothing of the package.
"""
