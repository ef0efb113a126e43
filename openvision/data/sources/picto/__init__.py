"""`picto`: emoji and clip art in many styles, a benchmark set for generalisation beyond the training data."""
